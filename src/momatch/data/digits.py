"""The built-in data: scikit-learn's 1,797 handwritten digits, 8×8, 17 grey levels.

Source: UCI "Optical recognition of handwritten digits", as shipped with scikit-learn.
"""

from __future__ import annotations

import torch

from momatch.data.images import ImageSet, Split, stratified_split

HELDOUT_FRACTION = 1 / 3
SPLIT_SEED = 0


def load_digits() -> Split:
    """1,198 training and 599 held-out digits, (N, 1, 8, 8) in [−1, 1], both with equal class proportions."""
    from sklearn.datasets import load_digits as load
    from sklearn.utils import Bunch

    bunch = load()
    assert isinstance(bunch, Bunch)
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    digits = ImageSet(images, torch.from_numpy(bunch.target).long(), 10, "digits", "digits-classifier")
    return stratified_split(digits, HELDOUT_FRACTION, SPLIT_SEED)
