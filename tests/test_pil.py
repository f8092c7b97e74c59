"""Samples as Pillow images: the right levels, and nothing that is no image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import momatch
from momatch.utils.errors import UsageError


def test_levels_are_those_of_the_samples():
    samples = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 1, 2, 2)
    (grey,) = momatch.to_pil(samples)
    assert grey.mode == "L" and np.asarray(grey).tolist() == [[0, 128], [255, 255]]
    rgb = momatch.to_pil(torch.stack([samples[0].expand(3, 2, 2)] * 2))
    assert len(rgb) == 2 and rgb[0].mode == "RGB" and np.asarray(rgb[1])[0, 1].tolist() == [128] * 3
    teacher = momatch.load_teacher("digits")
    assert [image.size for image in momatch.to_pil(teacher.sample(3, steps=1), teacher)] == [(8, 8)] * 3


@pytest.mark.parametrize("shape", [(4, 2), (4, 16, 2), (1, 3, 4, 8, 8)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(UsageError, match="are no images; give"):
        momatch.to_pil(torch.zeros(shape))
