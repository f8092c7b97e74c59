"""Makes the shipped files again: `python tools/make_assets.py classifier`, `… fashion14`, `… fashion28`,
`… teacher RUN`, `… captions`, `… matcher`.

The teacher is the outcome of `momatch train-teacher digits-teacher --out RUN`; making it an asset means
copying `RUN/teacher`. Classifiers are trained here, on the training images alone, by the same loop.
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
from momatch.data.fashion import load_fashion
from momatch.data.images import Split
from momatch.data.sources import load_data
from momatch.evaluation.builtin import WIDTHS, weights_of
from momatch.evaluation.features import ClassifierFeatures
from momatch.evaluation.features import batches as batches_of
from momatch.evaluation.retrieval import WEIGHTS, CaptionRetrieval
from momatch.networks.classifier import Classifier
from momatch.networks.matcher import Matcher
from momatch.training.batches import image_batches
from momatch.training.loop import train
from momatch.utils.files import write_tensors

ASSETS = Path(__file__).parent.parent / "src/momatch/assets"
SEED = 0
FASHION_WIDTH = 32


def make_classifier() -> None:
    """Train the digits classifier (500 steps, seconds) and write it with a note of how well it does."""
    train_classifier("digits-classifier", load_digits(), 500, "classifier")


def make_fashion_classifier(size: int) -> None:
    """The same for Fashion-MNIST at 14×14 or 28×28 (6 epochs; minutes); name a new one in builtin.WIDTHS."""
    train_classifier(f"fashion{size}-classifier", load_fashion(size), 2800, f"fashion{size}")


def train_classifier(name: str, data: Split, num_steps: int, made_by: str) -> None:
    """Train a classifier of the training images, and write it with its accuracy on the held-out ones."""
    torch.manual_seed(SEED)
    network = Classifier(width=WIDTHS.get(name, FASHION_WIDTH))
    batches = image_batches(data.train.images, data.train.labels, 128, SEED)
    optim = OptimConfig(learning_rate=2e-3, warmup_steps=50, beta1=0.9, eps=1e-8)
    config = TrainConfig(num_steps=num_steps, batch_size=128, seed=SEED)
    for _ in train(Classification(network), batches, config, optim):
        pass
    found = ClassifierFeatures(network.eval(), name)
    with torch.no_grad():
        predicted = torch.cat([found.predict(rows) for rows in batches_of(data.heldout.images, 500)])
    hits = predicted == data.heldout.labels
    write_tensors(weights_of(name), network.state_dict())
    note = {
        "made_by": f"python tools/make_assets.py {made_by}",
        "seed": SEED,
        "trained_on": f"{data.train.name}, {len(data.train)} pictures",
        "heldout_accuracy": round(float(hits.float().mean()), 4),
        "heldout_pictures": len(data.heldout),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    weights_of(name).with_suffix(".json").write_text(json.dumps(note, indent=2) + "\n")
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
    write_tensors(PROJECTION, {"mean": mean.float(), "basis": basis.float().contiguous()})
    packed = {
        "captions": levels[:-1],
        "captions_counts": counts[:-1].reshape(len(names), -1).to(torch.uint8),
        "null": levels[-1:],
        "null_counts": torch.ones(1, 1, dtype=torch.uint8),
        "scale": scale.float().reshape(1),
    }
    write_tensors(emoji.FOLDER / "captions.safetensors", packed)
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
    write_tensors(WEIGHTS, matcher.state_dict())
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
    elif sys.argv[1:] in (["fashion14"], ["fashion28"]):
        make_fashion_classifier(int(sys.argv[1].removeprefix("fashion")))
    elif len(sys.argv) == 3 and sys.argv[1] == "teacher":
        make_teacher(sys.argv[2])
    elif sys.argv[1:] == ["matcher"]:
        make_matcher()
    elif sys.argv[1:] == ["captions"]:
        make_captions()
    else:
        sys.exit(__doc__)
