"""Do pictures show what was asked for: the matcher, what evaluations make of it, EfficientNet's features."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from momatch.data.emoji import MASK, TOKENS, load_emoji
from momatch.evaluation import builtin, efficientnet
from momatch.evaluation.conditions import fixed_rows
from momatch.evaluation.efficientnet import SIDE, EfficientNetFeatures
from momatch.evaluation.evaluate import evaluate_at
from momatch.evaluation.retrieval import WEIGHTS, CaptionRetrieval
from momatch.methods.base import Batch
from momatch.models.provenance import Provenance
from momatch.networks.matcher import Matcher
from momatch.utils.errors import Notice

needs_features = pytest.mark.skipif(not efficientnet.installed(), reason="needs the extra features")


TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture
def contrastive(monkeypatch):
    """Training of the matcher, which is not shipped."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("contrastive")


@pytest.fixture(scope="module")
def data():
    return load_emoji(16)


def test_the_shipped_matcher_is_as_good_as_its_note_says(data):
    note = json.loads(WEIGHTS.with_suffix(".json").read_text())
    held = data.heldout
    right = CaptionRetrieval(held.conditions).predict(held.images[:]) == torch.arange(len(held))
    assert round(float(right.float().mean()), 4) == note["heldout_first"] > 40 / len(held)  # chance: 1 / 191


def test_large_pictures_are_averaged_down(data):
    judge, large = CaptionRetrieval(data.heldout.conditions), load_emoji(32).heldout.images[:50]
    small = torch.nn.functional.avg_pool2d(large, 2)
    assert torch.allclose(judge.scores(large), judge.scores(small), atol=1e-6)


class Replay:
    """A model that draws given pictures."""

    cond_shapes, num_classes, provenance = {TOKENS: (-1, 128), MASK: (-1,)}, 0, Provenance()

    def __init__(self, images):
        self.images, self.denoiser, self.device = images, SimpleNamespace(), images.device

    def sample_chunks(self, n, steps, cond, seed, **_):
        assert n == len(self.images) == len(cond[TOKENS])
        yield from self.images.split(100)


def test_evaluation_asks_for_held_out_captions_and_counts_what_fits(data, monkeypatch):
    monkeypatch.setattr(efficientnet, "installed", lambda: False)  # for speed
    held = data.heldout.images[:]
    with pytest.warns(Notice, match=r"judged on pixels alone; pip install 'momatch\[features\]'"):
        result = evaluate_at(Replay(held), "model", data, 8, len(held), resamples=2).result
    ceiling = result.get("retrieval_accuracy_reference").value
    assert result.get("retrieval_accuracy").value == ceiling > 0.2
    fewer = held[fixed_rows(data.heldout, 100)]  # they are spread over the captions, not the first 100
    asked = evaluate_at(Replay(fewer), "model", data, 8, 100, resamples=2).result
    assert asked.get("retrieval_accuracy").value > 0.2
    rolled = evaluate_at(Replay(held.roll(1, 0)), "model", data, 8, len(held), resamples=2).result
    assert rolled.get("retrieval_accuracy").value < 0.05


def test_judges_of_emoji(data):
    extractors, judge = builtin.judges(data.heldout)
    names = [extractor.name for extractor in extractors]
    assert names[-1].startswith("pixels") and judge.metric == "retrieval_accuracy"
    assert (len(names) == 2) == efficientnet.installed()


@needs_features
def test_features_are_the_ones_before_the_network_s_own_head(data):
    extractor = EfficientNetFeatures()
    images = data.heldout.images[:3]
    network = extractor._network
    seen = torch.nn.functional.interpolate(images, (SIDE, SIDE), mode="bilinear") * (127.5 / 128)
    kept = {}
    network._blocks[-1].register_forward_hook(lambda module, given, made: kept.update(made=made))
    network.extract_features(seen)
    assert torch.allclose(extractor(images), kept["made"].mean((2, 3)), atol=1e-5)
    assert extractor(images).shape == (3, 320)


def test_moved_pictures_get_white_edges(contrastive):
    moved = contrastive.moved
    x = torch.arange(9.0).view(1, 1, 3, 3) / 10
    assert moved(x, 1, 0)[0, 0].tolist() == [[1.0, *row[:2]] for row in x[0, 0].tolist()]
    assert moved(x, 0, -1)[0, 0].tolist() == [*x[0, 0].tolist()[1:], [1.0] * 3]


def test_contrastive_loss_is_the_cross_entropy_of_both_sides(contrastive):
    torch.manual_seed(0)
    matcher = Matcher(token_dim=4, dim=8, width=8).eval()
    cond = {TOKENS: torch.randn(5, 3, 4), MASK: torch.ones(5, 3)}
    x = torch.rand(5, 3, 16, 16)
    update = contrastive.Contrastive(matcher, noise_std=0.0, shift=0).step(
        0, Batch(x, cond, torch.Generator())
    )
    p, c = matcher(x, cond[TOKENS], cond[MASK])
    log = 10.0 * p @ c.T
    by_hand = -(log.log_softmax(1).diagonal().mean() + log.log_softmax(0).diagonal().mean()) / 2
    assert torch.allclose(update.losses["matcher"], by_hand, atol=1e-5)
