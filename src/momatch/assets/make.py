"""Makes the shipped models again: `python -m momatch.assets.make classifier`, then `… make teacher RUN`.

The teacher is the outcome of `momatch train-teacher digits-teacher --out RUN`; making it an asset means
copying `RUN/teacher`. The classifier is trained here, on the training digits alone, by the same loop.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from momatch.data.digits import load_digits
from momatch.evaluation.builtin import DIGITS_CLASSIFIER, DIGITS_CLASSIFIER_WIDTH
from momatch.methods.classification import Classification
from momatch.networks.classifier import Classifier
from momatch.training.batches import image_batches
from momatch.training.checkpoint import save_tensors
from momatch.training.loop import TrainConfig, train
from momatch.training.optim import OptimConfig

ASSETS = Path(__file__).parent
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
        "made_by": "python -m momatch.assets.make classifier",
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


if __name__ == "__main__":
    if sys.argv[1:] == ["classifier"]:
        make_classifier()
    elif len(sys.argv) == 3 and sys.argv[1] == "teacher":
        make_teacher(sys.argv[2])
    else:
        sys.exit(__doc__)
