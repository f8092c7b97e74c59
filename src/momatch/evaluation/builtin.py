"""Which feature network goes with which data: the digits classifier for digits, pixels for all else."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from momatch.evaluation.features import ClassifierFeatures, FeatureExtractor, PixelFeatures
from momatch.networks.classifier import Classifier

DIGITS_CLASSIFIER = Path(__file__).parent.parent / "assets" / "digits-classifier.safetensors"
DIGITS_CLASSIFIER_WIDTH = 16


def digits_classifier() -> ClassifierFeatures:
    """The classifier that ships with the package, trained on the training digits only."""
    network = Classifier(image_channels=1, num_classes=10, width=DIGITS_CLASSIFIER_WIDTH)
    network.load_state_dict(load_file(DIGITS_CLASSIFIER))
    return ClassifierFeatures(network.eval(), "digits-classifier")


def classifier(data_name: str) -> ClassifierFeatures | None:
    """The built-in classifier for a data set, if any, by the name of its `ImageSet` ("digits-train", …)."""
    return digits_classifier() if data_name.split("-")[0] == "digits" else None


def feature_extractor(data_name: str) -> FeatureExtractor:
    """Features for a data set: its classifier's if there is one, else pixels."""
    return classifier(data_name) or PixelFeatures()
