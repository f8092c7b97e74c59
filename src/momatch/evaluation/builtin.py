"""Which feature network goes with which data: the digits classifier for digits, pixels for all else."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from momatch.data.images import ImageSet
from momatch.evaluation.features import ClassifierFeatures, FeatureExtractor, PixelFeatures
from momatch.networks.classifier import Classifier

DIGITS_CLASSIFIER = Path(__file__).parent.parent / "assets" / "digits-classifier.safetensors"
DIGITS_CLASSIFIER_WIDTH = 16


def digits_classifier() -> ClassifierFeatures:
    """The classifier that ships with the package, trained on the training digits only."""
    network = Classifier(image_channels=1, num_classes=10, width=DIGITS_CLASSIFIER_WIDTH)
    network.load_state_dict(load_file(DIGITS_CLASSIFIER))
    return ClassifierFeatures(network.eval(), "digits-classifier")


def classifier(data: ImageSet) -> ClassifierFeatures | None:
    """The built-in classifier that knows these pictures, if any."""
    return digits_classifier() if data.classifier == "digits-classifier" else None


def pixel_features(data: ImageSet) -> PixelFeatures:
    """Pixels, under a name that says so if they are averaged."""
    size = 8
    averaged = max(data.images.shape[-2:]) > size
    return PixelFeatures(size, f"pixels averaged to {size}×{size}" if averaged else "pixels")


def feature_extractor(data: ImageSet) -> FeatureExtractor:
    """Features for a data set: its classifier's if there is one, else pixels."""
    return classifier(data) or pixel_features(data)
