"""Makes the shipped files again: `python tools/make_assets.py classifier`, `… teacher RUN`, `… captions`,
`… matcher`.

The teacher is the outcome of `momatch train-teacher digits-teacher --out RUN`; making it an asset means
copying `RUN/teacher`. The classifier is trained here, on the training digits alone, by the same loop.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from classification import Classification
from contrastive import Contrastive
from momatch.config.schema import OptimConfig, TrainConfig
from momatch.data import emoji
from momatch.data.digits import load_digits
from momatch.data.sources import load_data
from momatch.evaluation.builtin import DIGITS_CLASSIFIER, DIGITS_CLASSIFIER_WIDTH
from momatch.evaluation.retrieval import WEIGHTS, CaptionRetrieval
from momatch.networks.classifier import Classifier
from momatch.networks.matcher import Matcher
from momatch.training.batches import image_batches
from momatch.training.checkpoint import save_tensors
from momatch.training.loop import train

ASSETS = Path(__file__).parent.parent / "src/momatch/assets"
SEED = 0


def make_classifier() -> None:
    """Train the digits classifier (500 steps, seconds) and write it with a note of how well it does."""
    data = load_digits()
    torch.manual_seed(SEED)
    network = Classifier(width=DIGITS_CLASSIFIER_WIDTH)
    batches = image_batches(data.train.images, data.train.labels, 128, SEED)
    optim = OptimConfig(learning_rate=2e-3, warmup_steps=50, beta1=0.9, eps=1e-8)
    for _ in train(
        Classification(network), batches, TrainConfig(num_steps=500, batch_size=128, seed=SEED), optim
    ):
        pass
    network.eval()
    with torch.no_grad():
        hits = network(data.heldout.images).argmax(1) == data.heldout.labels
    save_tensors(DIGITS_CLASSIFIER, network.state_dict())
    note = {
        "made_by": "python tools/make_assets.py classifier",
        "seed": SEED,
        "trained_on": f"{data.train.name}, {len(data.train)} pictures",
        "heldout_accuracy": round(float(hits.float().mean()), 4),
        "heldout_pictures": len(data.heldout),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    DIGITS_CLASSIFIER.with_suffix(".json").write_text(json.dumps(note, indent=2) + "\n")
    print(note)


def make_teacher(run: str) -> None:
    """Copy a finished run's teacher into the package."""
    target = ASSETS / "digits-teacher"
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(Path(run) / "teacher", target)
    print(f"{run}/teacher → {target}")


def make_captions() -> None:
    """Encode the emoji's captions, and find the reduction to 128 numbers a token; needs the extra `text`."""
    from momatch.interop.text_encoders import PROJECTION, SentenceEncoder

    encoder = SentenceEncoder()
    _, names, subcategories = emoji.pictures()
    texts = [text for pair in zip(names, subcategories, strict=True) for text in emoji.wordings(*pair)]
    tokens, mask = encoder.tokens([*texts, ""], most=255)
    flat, counts = tokens[mask].double(), mask.sum(1)
    mean = flat.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov((flat - mean).T))
    basis = vectors.flip(1)[:, : emoji.TOKEN_DIM]
    reduced = (flat - mean) @ basis
    scale = reduced.abs().max() / 127
    levels = (reduced / scale).round().to(torch.int8)
    save_tensors(PROJECTION, {"mean": mean.float(), "basis": basis.float().contiguous()})
    packed = {
        "captions": levels[:-1],
        "captions_counts": counts[:-1].reshape(len(names), -1).to(torch.uint8),
        "null": levels[-1:],
        "null_counts": torch.ones(1, 1, dtype=torch.uint8),
        "scale": scale.float().reshape(1),
    }
    save_tensors(emoji.FOLDER / "captions.safetensors", packed)
    kept = reduced.var(0).sum() / flat.var(0).sum()
    print(f"{len(texts)} captions, {len(levels)} tokens, {float(kept):.3f} of the variance kept")


def make_matcher() -> None:
    """Train the network that tells which caption a picture belongs to (1,000 steps, some minutes)."""
    data = load_data("emoji", 16)
    torch.manual_seed(SEED)
    matcher = Matcher()
    batches = image_batches(data.train.images, None, 256, SEED, data.train.conditions)
    optim = OptimConfig(learning_rate=2e-3, warmup_steps=50, beta1=0.9, eps=1e-8)
    for _ in train(
        Contrastive(matcher), batches, TrainConfig(num_steps=1000, batch_size=256, seed=SEED), optim
    ):
        pass
    save_tensors(WEIGHTS, matcher.state_dict())
    judge, right = CaptionRetrieval(data.heldout.conditions), torch.arange(len(data.heldout))
    scores = judge.scores(data.heldout.images[:])
    rank = (scores >= scores[right, right][:, None]).sum(1)
    note = {
        "made_by": "python tools/make_assets.py matcher",
        "seed": SEED,
        "trained_on": f"{data.train.name}, {len(data.train)} pictures",
        "heldout_pictures": len(data.heldout),
        "heldout_first": round(float((rank <= 1).float().mean()), 4),
        "heldout_among_first_5": round(float((rank <= 5).float().mean()), 4),
        "parameters": sum(p.numel() for p in matcher.parameters()),
    }
    WEIGHTS.with_suffix(".json").write_text(json.dumps(note, indent=2) + "\n")
    print(note)


if __name__ == "__main__":
    if sys.argv[1:] == ["classifier"]:
        make_classifier()
    elif len(sys.argv) == 3 and sys.argv[1] == "teacher":
        make_teacher(sys.argv[2])
    elif sys.argv[1:] == ["matcher"]:
        make_matcher()
    elif sys.argv[1:] == ["captions"]:
        make_captions()
    else:
        sys.exit(__doc__)
