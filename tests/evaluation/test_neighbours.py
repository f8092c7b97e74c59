import pytest
import torch

from momatch.evaluation.neighbours import nearest_distances, neighbour_check


def pictures(n, seed=0):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 9, 1000])
def test_nearest_distances_equal_all_pairs(chunk):
    images, training = pictures(20), pictures(30, 1)
    expected = torch.cdist(images.flatten(1).double(), training.flatten(1).double()).amin(1)
    assert torch.allclose(nearest_distances(images, training, chunk), expected)


def test_copies_are_found_exactly():
    training = pictures(200) + 50
    check = neighbour_check(training[:50], pictures(100, 1) + 50, training)
    assert check.median_generated == 0.0 and check.ratio == 0.0 and check.share_close == 1.0


def test_fresh_pictures_look_like_held_out_ones():
    check = neighbour_check(pictures(4000), pictures(2000, 1), pictures(300, 2))
    assert check.ratio == pytest.approx(1, abs=0.03)
    assert check.share_close == pytest.approx(0.01, abs=0.008)
    assert check.close_distance < check.median_held_out


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="0 training pictures"):
        nearest_distances(pictures(3), pictures(0))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\).*shape \(4, 4\)"):
        nearest_distances(pictures(3), pictures(3)[:, 0])
