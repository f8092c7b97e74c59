"""Rows that are read when asked for are the rows that were written."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from momatch.data.images import ImageSet, stratified_split
from momatch.data.rows import DamagedShardError, Pixels, Shards, held_bytes, sample_of, spread, take
from momatch.evaluation.features import PixelFeatures, extract
from momatch.evaluation.neighbours import nearest_distances
from momatch.training.batches import image_batches

COUNTS = (3, 4, 2)


def shards(folder, table, name="latents", **more):
    folder.mkdir(exist_ok=True)
    files = [folder / f"shard-{i}.safetensors" for i in range(len(COUNTS))]
    for file, part in zip(files, table.split(COUNTS), strict=True):
        save_file({name: part.contiguous(), "labels": torch.zeros(len(part))}, file)
    return Shards(files, COUNTS, name, tuple(table.shape[1:]), table.dtype, **more)


TABLE = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "wanted",
    [0, -1, 5, slice(None), slice(2, 8, 3), torch.tensor([8, 0, 3, 3, 2]), torch.arange(9) % 2 == 0, (1, 0)],
    ids=str,
)
def test_shards_are_indexed_as_the_tensor_they_hold(tmp_path, wanted):
    rows = shards(tmp_path, TABLE)
    assert torch.equal(rows[wanted], TABLE[wanted])
    assert tuple(rows.shape) == tuple(TABLE.shape) and rows.ndim == 3 and len(rows) == 9
    assert torch.equal(torch.stack(list(rows)), TABLE) and torch.equal(torch.cat(list(rows.chunks(2))), TABLE)


def test_a_subset_of_a_subset_copies_nothing_and_holds_the_right_rows(tmp_path):
    rows, first, second = shards(tmp_path, TABLE), torch.tensor([7, 1, 1, 4]), torch.tensor([3, 0])
    assert torch.equal(rows.subset(first).subset(second)[:], TABLE[first][second])
    assert torch.equal(take(rows, first)[:], take(TABLE, first))
    levels = torch.zeros(100, 1, 4, 4, dtype=torch.uint8)
    assert Pixels(levels).subset(first)._levels is levels and held_bytes(rows) == 0


@pytest.mark.parametrize("wanted", [9, -10, torch.tensor([0, 9])], ids=str)
def test_a_row_that_is_not_there_is_an_index_error(tmp_path, wanted):
    with pytest.raises(IndexError):
        shards(tmp_path, TABLE)[wanted]


def test_half_precision_comes_as_float32_and_integers_as_they_are(tmp_path):
    half = shards(tmp_path / "half", TABLE.half())
    assert half.dtype == torch.float32 and torch.equal(half[:], TABLE.half().float())
    mask = (TABLE > 0).long()
    assert torch.equal(shards(tmp_path / "mask", mask)[:], mask)
    levels = (TABLE * 50).clamp(0, 255).byte()
    as_pictures = shards(tmp_path / "pictures", levels, pictures=True)
    assert torch.equal(as_pictures[:], levels.float() / 127.5 - 1) and as_pictures.dtype == torch.float32


def test_shards_are_opened_when_first_needed_and_mapped(tmp_path):
    rows = shards(tmp_path, TABLE)
    (tmp_path / "shard-2.safetensors").unlink()
    assert torch.equal(rows[:7], TABLE[:7])
    maps = open("/proc/self/maps").read()
    assert "shard-0.safetensors" in maps and "shard-1.safetensors" in maps
    with pytest.raises(DamagedShardError, match="shard-2.safetensors is missing or damaged"):
        rows[8]


def test_a_shard_of_another_shape_is_named(tmp_path):
    rows = shards(tmp_path, TABLE)
    save_file({"latents": torch.zeros(4, 9)}, tmp_path / "shard-1.safetensors")
    with pytest.raises(DamagedShardError, match=r"shard-1.safetensors holds latents of shape \(4, 9\)"):
        rows[:]


def levels(n=40, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, 4, 4), dtype=np.uint8))


def test_pixels_train_and_are_fingerprinted_as_the_float_pictures_that_they_stand_for():
    """Bit for bit: a run on pictures in memory as float32 goes on with them as uint8."""
    as_floats, as_levels = levels().float() / 127.5 - 1, Pixels(levels())
    labels = torch.arange(40) % 4
    sets = [ImageSet(images, labels, 4, "a") for images in (as_floats, as_levels)]
    assert sets[0].fingerprint() == sets[1].fingerprint()
    splits = [stratified_split(each, 0.25, seed=3) for each in sets]
    assert splits[0].train.fingerprint() == splits[1].train.fingerprint()
    batches = [image_batches(s.train.images, s.train.labels, 16, seed=5)(7) for s in splits]
    assert torch.equal(batches[0].x, batches[1].x) and batches[1].x.is_contiguous()
    assert torch.equal(batches[0].cond["label"], batches[1].cond["label"])
    assert torch.equal(batches[0].normal(), batches[1].normal())
    assert held_bytes(as_levels) * 4 == held_bytes(as_floats)
    assert as_levels.row_bytes * 40 == held_bytes(as_floats)


def test_fingerprints_of_many_pixels_see_every_one(monkeypatch):
    monkeypatch.setattr("momatch.data.rows.WHOLE_FINGERPRINT", 0)

    def fingerprint(table, index=None):
        rows = Pixels(table) if index is None else Pixels(table).subset(index)
        return ImageSet(rows, torch.zeros(len(rows)), 1, "a").fingerprint()

    changed = levels()
    changed[17, 2, 3, 1] += 1
    assert fingerprint(levels()) == fingerprint(levels()) != fingerprint(changed)
    order = torch.arange(40).flip(0)
    assert fingerprint(levels(), order) == fingerprint(levels()[order]) != fingerprint(levels())


def test_the_fingerprint_of_shards_sees_names_sizes_headers_order_and_sampled_rows(tmp_path):
    def of(rows):
        return ImageSet(rows, torch.zeros(9), 1, "a").fingerprint()

    rows = shards(tmp_path / "a", TABLE)
    base = of(rows)
    assert of(shards(tmp_path / "b", TABLE)) == base, "the folder's own name does not count"
    assert of(rows.subset(torch.arange(9).flip(0))) != base
    changed = TABLE.clone()
    changed[4, 0, 0] += 1
    assert of(shards(tmp_path / "c", changed)) != base
    file = tmp_path / "b" / "shard-1.safetensors"
    save_file({"latents": TABLE[3:7], "labels": torch.zeros(4)}, file, metadata={"fingerprint": "other"})
    assert of(shards_at(tmp_path / "b")) != base


def test_the_fingerprint_of_shards_sees_a_digest_in_the_header(tmp_path):
    """What `momatch prepare` wrote there covers rows that are not sampled."""
    found = []
    for digest in ("aaaa", "bbbb"):
        (tmp_path / digest).mkdir()
        files = [tmp_path / digest / f"shard-{i}.safetensors" for i in range(len(COUNTS))]
        for file, part in zip(files, TABLE.split(COUNTS), strict=True):
            save_file({"latents": part.contiguous()}, file, metadata={"contents": digest})
        found.append(shards_at(tmp_path / digest).evidence())
    assert not torch.equal(*found)


def shards_at(folder):
    return Shards(sorted(folder.glob("*.safetensors")), COUNTS, "latents", (2, 3), torch.float32)


def test_conditions_and_captions_follow_their_pictures(tmp_path):
    n = torch.arange(9.0)
    data = ImageSet(
        shards(tmp_path, TABLE), n.long() % 3, 3, "a",
        conditions={"prompt": shards(tmp_path / "p", n[:, None] * torch.ones(9, 2), "prompt")},
        captions=[f"number {i}" for i in range(9)],
    )  # fmt: skip
    part = data.subset(torch.tensor([5, 2, 8]), "part")
    assert part.conditions["prompt"][:, 0].tolist() == [5, 2, 8] and part.labels.tolist() == [2, 2, 2]
    assert part.captions == ["number 5", "number 2", "number 8"] and torch.equal(part.images[1], TABLE[2])
    batch = image_batches(data.images, data.labels, 32, seed=0, conditions=data.conditions)(0)
    index = batch.cond["prompt"][:, 0].long()
    assert torch.equal(batch.x, TABLE[index]) and torch.equal(batch.cond["label"], index % 3)
    plain = image_batches(TABLE, None, 32, seed=0)(0)
    assert torch.equal(plain.x, batch.x) and plain.cond is None, "conditions change no draw"
    other = dataclasses.replace(data, null_condition={"prompt": torch.ones(2)})
    assert other.fingerprint() != data.fingerprint() == dataclasses.replace(data, name="b").fingerprint()


def test_features_and_neighbours_of_rows_are_those_of_the_tensor():
    rows, tensor = Pixels(levels()), levels().float() / 127.5 - 1
    assert torch.equal(extract(PixelFeatures(2), rows, 7), extract(PixelFeatures(2), tensor, 7))
    assert torch.equal(nearest_distances(rows, tensor[:9], 7), nearest_distances(tensor, tensor[:9], 7))


def test_a_sample_is_spread_evenly_and_bounded():
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4] and spread(10, 4).tolist() == [0, 2, 5, 7]
    rows = Pixels(levels())
    assert (
        len(sample_of(rows, max_bytes=rows.row_bytes * 6 + 5)) == 6 and len(sample_of(rows, max_rows=8)) == 8
    )
    assert torch.equal(sample_of(rows), rows[:])
