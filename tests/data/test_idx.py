"""idx files as MNIST and Fashion-MNIST are published, and what is said of those that cannot be read."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from momatch.cli import main
from momatch.data import fashion
from momatch.data.idx import read_idx
from momatch.data.image_io import DataError
from momatch.data.sources import load_data, open_collection
from momatch.evaluation.builtin import classifier

RNG = np.random.default_rng(3)
TRAIN, TEST = RNG.integers(0, 256, (120, 28, 28), np.uint8), RNG.integers(0, 256, (40, 28, 28), np.uint8)
TRAIN_LABELS, TEST_LABELS = np.arange(120) % 10, (np.arange(40) * 3) % 10


def idx(array) -> bytes:
    """Written here from the published description, not by the code under test."""
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def publish(folder, names="{}-images-idx3-ubyte {}-labels-idx1-ubyte", test="t10k", pack=lambda b: b):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = names.split()
    for part, arrays in (("train", (TRAIN, TRAIN_LABELS)), (test, (TEST, TEST_LABELS))):
        if part:
            for name, array in zip((images, labels), arrays, strict=True):
                (folder / name.format(part)).write_bytes(pack(idx(array)))
    return folder


@pytest.mark.parametrize(
    ("names", "test", "pack"),
    [
        ("{}-images-idx3-ubyte.gz {}-labels-idx1-ubyte.gz", "t10k", gzip.compress),
        ("{}-images.idx3-ubyte {}-labels.idx1-ubyte", "t10k", lambda b: b),
        ("emnist-letters-{}-images-idx3-ubyte emnist-letters-{}-labels-idx1-ubyte", "test", lambda b: b),
    ],
    ids=["as published", "unpacked with dots", "EMNIST"],
)
def test_the_split_is_the_published_one(tmp_path, names, test, pack):
    with pytest.warns(UserWarning, match="160 pictures; 40 test images among them, as published"):
        data = load_data(str(publish(tmp_path / "clothes", names, test, pack)))
    assert torch.equal(data.train.images[:], torch.from_numpy(TRAIN)[:, None].float() / 127.5 - 1)
    assert torch.equal(data.heldout.images[:], torch.from_numpy(TEST)[:, None].float() / 127.5 - 1)
    assert data.train.labels.tolist() == TRAIN_LABELS.tolist()
    assert data.heldout.labels.tolist() == TEST_LABELS.tolist()
    assert data.train.num_classes == 10 and data.heldout.name == "clothes-test"


def test_images_are_reduced_by_exact_means_of_squares(tmp_path):
    source = str(publish(tmp_path / "clothes"))
    for size in (14, 7):
        factor = 28 // size
        means = TRAIN.reshape(120, size, factor, size, factor).astype(np.float64).mean((2, 4)) / 127.5 - 1
        found = load_data(source, size).train.images
        assert found.shape == (120, 1, size, size)
        np.testing.assert_allclose(found[:, 0].numpy(), means, atol=1e-6)  # not rounded to levels
    with pytest.raises(DataError, match="image_size is 16, but .* by whole factors only; use 4, 7, 14"):
        load_data(source, 16)


def test_without_test_images_a_tenth_of_every_class_is_held_out(tmp_path):
    data = load_data(str(publish(tmp_path / "clothes", test="")))
    assert len(data.train) == 110 and data.heldout.labels.sort().values.tolist() == list(range(10))


def test_other_commands_read_them_too(tmp_path, capsys):
    source = publish(tmp_path / "clothes")
    (source / "readme.md").write_text("clothes")
    found = open_collection(str(source))
    assert np.array_equal(found.item(121).pixels, TEST[1]) and found.labels is not None
    assert found.item(121, image_size=14).pixels.shape == (14, 14)
    before = found.identity()
    (source / "t10k-labels-idx1-ubyte").write_bytes(gzip.compress(idx(TEST_LABELS)))
    assert open_collection(str(source)).identity() != before
    assert main(["inspect", str(source), "--sheet", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr().out
    assert "160 pictures" in printed and "28×28 (160)" in printed and "1 .md" in printed


def test_broken_files_are_one_sentence(tmp_path):
    source = publish(tmp_path / "clothes")
    images, labels = source / "train-images-idx3-ubyte", source / "train-labels-idx1-ubyte"
    good = images.read_bytes()
    for contents, message in (
        (good[:-1], "does not fit its own dimensions .* cut short"),
        (good + b"1", "does not fit its own dimensions"),
        (good[:9], "does not fit its own dimensions"),
        (b"", "begins with the bytes"),
        (b"<html>", "begins with the bytes 3c 68 74 6d"),
        (b"\0\0\x0d" + good[3:], "begins with the bytes 00 00 0d"),
        (gzip.compress(good)[:-20], "cannot read"),
        (idx(TRAIN_LABELS), "images have"),
    ):
        images.write_bytes(contents)
        with pytest.raises(DataError, match=message):
            load_data(str(source))
    images.write_bytes(good)
    labels.write_bytes(idx(TRAIN_LABELS[:-1]))
    with pytest.raises(DataError, match=r"\(119,\), .* \(120, 28, 28\); fetch both again"):
        load_data(str(source))
    labels.unlink()
    (source / "t10k-labels-idx1-ubyte").unlink()
    assert set(load_data(str(source)).train.labels.tolist()) == {0}  # no labels, no classes
    (source / "train-images-idx3-ubyte.gz").write_bytes(good)
    with pytest.raises(DataError, match="both images of the same part"):
        load_data(str(source))
    for file in source.glob("train*"):
        file.unlink()
    with pytest.raises(DataError, match="no train-images"):
        load_data(str(source))


def test_fashion_mnist_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "FOLDERS", (tmp_path / "none", tmp_path / "clothes"))
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist, or put .* into .*none"):
        load_data("fashion-mnist")
    publish(tmp_path / "clothes", "{}-images-idx3-ubyte.gz {}-labels-idx1-ubyte.gz", pack=gzip.compress)
    small, large = load_data("fashion-mnist", 14), load_data("fashion-mnist")
    assert small.train.images.shape == (120, 1, 14, 14) and large.heldout.images.shape == (40, 1, 28, 28)
    assert small.train.class_names[9] == "Ankle boot" and small.train.num_classes == 10
    assert [d.train.name for d in (small, large)] == ["fashion14-train", "fashion28-train"]
    judge = classifier(small.train)
    assert judge is not None and judge.name == "fashion14-classifier"
    assert judge(small.train.images[:3]).shape == (3, 64)
    assert classifier(large.train) is None  # none ships yet: judged on pixels
    with pytest.raises(DataError, match="image_size is 20, but Fashion-MNIST comes as 14×14 or 28×28"):
        load_data("fashion-mnist", 20)


@pytest.mark.skipif(fashion.folder() is None, reason="Fashion-MNIST is not installed")
def test_the_shipped_classifier_is_as_accurate_as_its_note_says():
    import json

    from momatch.evaluation.builtin import weights_of

    data = load_data("fashion-mnist", 14).heldout
    assert len(data) == 10_000 and torch.bincount(data.labels).tolist() == [1000] * 10
    judge = classifier(data)
    assert judge is not None
    hits = judge.predict(data.images[:1000]) == data.labels[:1000]
    note = json.loads(weights_of(judge.name).with_suffix(".json").read_text())
    assert abs(float(hits.float().mean()) - note["heldout_accuracy"]) < 0.03  # three errors of 1,000 images


def test_a_file_that_cannot_be_opened_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        read_idx(tmp_path / "nothing")


def test_labels_of_one_part_alone_are_refused(tmp_path):
    source = publish(tmp_path / "clothes")
    (source / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="has labels of one part of its images alone"):
        load_data(source)
