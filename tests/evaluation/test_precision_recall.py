import pytest
import torch

from momatch.evaluation.precision_recall import precision_recall


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def line(*positions):
    return torch.tensor(positions, dtype=torch.float32)[:, None]


def test_identical_sets_are_perfect():
    x = torch.randn(50, 8, generator=rng())
    result = precision_recall(x, x, rng())
    assert (result.precision, result.recall, result.n) == (1.0, 1.0, 50)


def test_distant_sets_have_nothing_in_common():
    x = torch.randn(50, 8, generator=rng())
    result = precision_recall(x, x + 100, rng())
    assert (result.precision, result.recall) == (0.0, 0.0)


def test_one_mode_of_two_is_precise_and_forgetful():
    """Equally many points, but all generated ones in one mode: precision 1, recall 1/2."""
    generator = rng()
    mode = torch.randn(100, 2, generator=generator)
    reference = torch.cat([mode[:50], mode[50:] + 1000])
    result = precision_recall(mode.repeat_interleave(2, 0)[:100], reference, generator, k=5)
    assert result.precision == 1.0
    assert result.recall == pytest.approx(0.5, abs=0.05)


def test_known_answer_on_a_line():
    """For k = 1: reference 0 ± 1, 1 ± 1, 10 ± 2, 12 ± 2. generated 2 ± 1, 3 ± 1, 5 ± 2, 13 ± 8."""
    result = precision_recall(line(2, 3, 5, 13), line(0, 1, 10, 12), rng(), k=1)
    assert result.precision == 0.5  # 2 lies on the edge of 1 ± 1, 13 in 12 ± 2
    assert result.recall == 0.75  # 1 on the edge of 2 ± 1; 10 and 12 in 13 ± 8


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_matter_and_sizes_are_made_equal(chunk):
    x, y = torch.randn(60, 3, generator=rng()), torch.randn(31, 3, generator=rng(1))
    result = precision_recall(x, y, rng(5), chunk=chunk)
    assert result.n == 31
    assert result == precision_recall(x, y, rng(5))
    swapped = precision_recall(y, y + 0.01, rng(5), chunk=chunk)
    assert swapped.n == 31


def test_bad_input_is_refused():
    x = torch.randn(20, 3)
    with pytest.raises(ValueError, match="3 reference samples are too few; give at least 4"):
        precision_recall(x, x[:3], rng())
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        precision_recall(x, x, rng(), k=0)
    with pytest.raises(ValueError, match="2 of 20 reference samples have NaN"):
        precision_recall(x, x.index_fill(0, torch.tensor([4, 5]), float("inf")), rng())
