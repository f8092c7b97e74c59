"""The built-in captioned pictures: sizes, captions, wordings, and what a minibatch of them is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from momatch.data.emoji import MASK, MAX_TOKENS, TOKEN_DIM, TOKENS, load_emoji, pictures, wordings
from momatch.data.image_io import DataError
from momatch.data.paraphrases import Wordings
from momatch.training.batches import image_batches


def test_split_holds_a_tenth_out_and_nothing_twice():
    split = load_emoji(16)
    assert (len(split.train), len(split.heldout)) == (1720, 191)
    names = [*split.train.captions, *split.heldout.captions]
    assert sorted(names) == sorted(pictures()[1])


def test_small_pictures_are_means_of_large_ones():
    small, large = load_emoji(16).heldout.images[:5], load_emoji().heldout.images[:5]
    assert large.shape == (5, 3, 32, 32)
    mean = large.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    assert (small - mean).abs().max() <= 0.5 / 127.5 + 1e-6  # rounded to a level


def test_other_sizes_are_refused():
    with pytest.raises(DataError, match="image_size is 64, but the built-in emoji come as 16×16 or 32×32"):
        load_emoji(64)


def test_captions_come_in_other_words():
    assert wordings("red heart", "emotion") == ["red heart", "a red heart", "red heart, emotion"]
    assert wordings("octopus", "animal-marine")[1:] == ["an octopus", "octopus, animal marine"]
    assert wordings("algeria flag", "country-flag")[1] == "flag of algeria"
    assert wordings("field hockey stick and ball", "sport")[1] == "ball and field hockey stick"


def test_wordings_are_unpacked_by_hand():
    tokens = torch.arange(1, 13, dtype=torch.int8).reshape(6, 2)
    counts = torch.tensor(
        [[1, 2], [3, 0]]
    )  # picture 0: token 0 | tokens 1, 2; picture 1: tokens 3, 4, 5 | none
    rows = Wordings(tokens, counts, 0.5, 2, "tokens")
    mask = Wordings(tokens, counts, 0.5, 2, "mask")
    assert rows[:].tolist() == [[[0.5, 1.0], [0.0, 0.0]], [[3.5, 4.0], [4.5, 5.0]]]
    assert mask[:].tolist() == [[1, 0], [1, 1]]
    drawn = torch.tensor([0, 1, 0]), torch.tensor([0.5, 0.99, 0.49])
    assert rows.draw(*drawn).tolist() == [[[1.5, 2.0], [2.5, 3.0]], [[0, 0], [0, 0]], [[0.5, 1.0], [0, 0]]]
    assert mask.draw(*drawn).tolist() == [[1, 1], [0, 0], [1, 0]]
    one = rows.subset(torch.tensor([1]))
    assert one.shape == (1, 2, 2) and one.draw(torch.tensor([0]), torch.tensor([0.0])).tolist() == [
        rows[1].tolist()
    ]


def test_minibatches_draw_every_wording_the_same_for_tokens_and_mask():
    data = load_emoji(16).train
    batch = image_batches(data.images, None, 256, 0, data.conditions)(3)
    tokens, mask = batch.cond[TOKENS], batch.cond[MASK]
    assert tokens.shape == (256, MAX_TOKENS, TOKEN_DIM) and batch.x.shape == (256, 3, 16, 16)
    assert ((tokens.abs().sum(2) > 0) == mask.bool()).all()
    again = image_batches(data.images, None, 256, 0, data.conditions)(3)
    assert torch.equal(tokens, again.cond[TOKENS])
    counts = data.conditions[MASK][:].sum(1)
    assert (
        not np.isin(mask.sum(1), counts.unique()).all() or mask.sum(1).float().mean() > counts.float().mean()
    )


def test_null_condition_is_that_of_no_words():
    null = load_emoji(16).train.null_condition
    assert null[TOKENS].shape == (MAX_TOKENS, TOKEN_DIM) and null[MASK].tolist() == [1] + [0] * (
        MAX_TOKENS - 1
    )
