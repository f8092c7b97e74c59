"""Pictures to feature vectors: what every metric here compares.

A feature extractor is anything with a name that maps a batch of pictures to a batch of vectors. Its name goes
into every number that is reported, because distances on one extractor say nothing about another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momatch.data.rows import Rows


@runtime_checkable
class FeatureExtractor(Protocol):
    """A named map from pictures to vectors."""

    @property
    def name(self) -> str:
        """What reports call these features."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B, C, H, W), float in [−1, 1] → features (B, D), float."""
        ...


class Classifier(Protocol):
    """Anything that assigns labels to pictures; `ClassifierFeatures` is one.

    Attributes:
        metric: what the share of pictures with the label asked for is called: "class_accuracy", or
            "retrieval_accuracy" where labels are captions.
    """

    @property
    def metric(self) -> str:
        """See above."""
        ...

    @property
    def name(self) -> str:
        """What reports call this classifier."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """Pictures (B, C, H, W), float in [−1, 1] → labels (B,), integer."""
        ...


class PixelFeatures:
    """The pixels themselves, flattened; larger pictures averaged down to 8×8 first.

    A Fréchet distance needs more pictures than features, and the time of its interval grows with their cube.

    Args:
        size: side of what is compared.
        name: what reports call them.
    """

    def __init__(self, size: int = 8, name: str = "pixels"):
        self.size = size
        self.name = name

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D), D at most C · size²."""
        height, width = (min(self.size, side) for side in images.shape[-2:])
        return F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)


class DecodedFeatures:
    """Another extractor's features of latents, which are decoded to pictures first.

    Args:
        inner: sees the pictures; its name is the name of the whole.
        decoder: latents (B, c, h, w) → pictures (B, C, H, W).
    """

    def __init__(self, inner: FeatureExtractor, decoder: Callable[[Tensor], Tensor]):
        self.inner, self.decoder, self.name = inner, decoder, inner.name

    def __call__(self, images: Tensor) -> Tensor:
        """(B, c, h, w) → (B, D)."""
        return self.inner(self.decoder(images))


class ClassifierFeatures:
    """The inner features of a trained classifier, and its labels.

    Attributes:
        network: a module with `.features(images) -> (B, D)` and `.forward(images) -> logits (B, classes)`. It
            is put into evaluation mode, not copied; pictures are sent to its device.
        name: what reports call it, e.g. "digits-classifier".
    """

    metric = "class_accuracy"

    def __init__(self, network: nn.Module, name: str):
        features = getattr(network, "features", None)
        if not callable(features):
            raise ValueError(
                f"{type(network).__name__} has no method features(images); add one that returns (B, D)"
            )
        self.network, self.name = network.eval(), name
        self._features = cast(Callable[[Tensor], Tensor], features)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D)."""
        return self._features(self._prepare(images)).flatten(1)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → the most likely label of each, (B,)."""
        return self.network(self._prepare(images)).argmax(1)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, classes), each row summing to 1."""
        return self.network(self._prepare(images)).softmax(1)

    def _prepare(self, images: Tensor) -> Tensor:
        parameter = next(self.network.parameters(), None)
        return images if parameter is None else images.to(parameter.device, parameter.dtype)


def extract(
    extractor: FeatureExtractor, images: Tensor | Rows | Iterable[Tensor], batch_size: int = 500
) -> Tensor:
    """Features of all pictures.

    Args:
        extractor: what to compute.
        images: (N, C, H, W), or an iterable of (B, C, H, W) batches, which is read once; only a tensor is
            ever held as a whole.
        batch_size: the extractor sees at most so many pictures at a time.

    Returns:
        (N, D) float32 on the CPU.

    Raises:
        ValueError: if there are no pictures, or the extractor does not return one vector for each.
    """
    features = []
    for batch in batches(images, batch_size):
        vectors = extractor(batch).detach()
        if vectors.ndim != 2 or len(vectors) != len(batch):
            raise ValueError(
                f"features {extractor.name!r} have shape {tuple(vectors.shape)} for {len(batch)} pictures; "
                "the extractor must return (B, D)"
            )
        features.append(vectors.float().cpu())
    if not features:
        raise ValueError("there are no pictures to extract features from; give at least 2")
    return torch.cat(features)


def batches(images: Tensor | Rows | Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Cut one tensor, rows, or each tensor of an iterable, into pieces of at most `batch_size` pictures."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(images, Rows):
        images = images.chunks(batch_size)
    for chunk in [images] if isinstance(images, Tensor) else images:
        if len(chunk):
            yield from chunk.split(batch_size)


def check_features(features: Tensor, role: str, minimum: int = 2) -> Tensor:
    """Return `features` as they are, once they are known to be usable.

    Args:
        features: (N, D).
        role: what to call them in an error: "generated" or "reference".
        minimum: how many are needed.

    Raises:
        ValueError: if they are not (N, D), fewer than `minimum`, or not finite.
    """
    if features.ndim != 2:
        raise ValueError(
            f"{role} features have shape {tuple(features.shape)}; give (N, D), e.g. from extract()"
        )
    if len(features) < minimum:
        raise ValueError(f"{len(features)} {role} samples are too few; give at least {minimum}")
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(features)} {role} samples have NaN or infinite features; look at those pictures "
            "first, a metric over the others alone would flatter the model"
        )
    return features


def check_pair(generated: Tensor, reference: Tensor, minimum: int = 2) -> None:
    """`check_features` on both sides, and that they have the same dimension.

    Raises:
        ValueError: if a side is unusable, or the two have different D.
    """
    check_features(generated, "generated", minimum)
    check_features(reference, "reference", minimum)
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f"generated features have {generated.shape[1]} dimensions, the reference {reference.shape[1]}; "
            "extract both with the same extractor at the same picture size"
        )
