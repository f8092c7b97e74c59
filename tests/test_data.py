"""Where pictures come from, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from momatch.data.digits import load_digits
from momatch.data.sources import DataError, load_data


def test_digits_are_split_once_and_for_all_without_overlap():
    data, again = load_digits(), load_digits()
    assert len(data.train) + len(data.heldout) == 1797 and len(data.heldout) == 599
    assert torch.equal(data.train.images, again.train.images)
    assert float(data.train.images.min()) == -1 and float(data.train.images.max()) == 1
    train = {tuple(x.flatten().tolist()) for x in data.train.images}
    assert not any(tuple(x.flatten().tolist()) in train for x in data.heldout.images)
    share = data.heldout.labels.bincount() / (data.train.labels.bincount() + data.heldout.labels.bincount())
    assert float((share - 1 / 3).abs().max()) < 0.01


def pictures(n=120, shape=(6, 6)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def test_folder_and_npz_of_the_same_pictures_agree(tmp_path):
    images, labels = pictures(), np.arange(120) % 2
    for i, image in enumerate(images):
        folder = tmp_path / "folder" / f"class{labels[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    folder, npz = load_data(str(tmp_path / "folder")), load_data(str(tmp_path / "data.npz"))
    assert folder.train.num_classes == npz.train.num_classes == 2 and folder.train.images.shape[1:] == (
        1,
        6,
        6,
    )
    assert len(folder.heldout) == len(npz.heldout) == 12

    def multiset(images, labels):
        return sorted((int(y), *x.flatten().tolist()) for x, y in zip(images, labels, strict=True))

    def everything(split):
        images = torch.cat([split.train.images[:], split.heldout.images[:]])
        return multiset(images, torch.cat([split.train.labels, split.heldout.labels]))

    assert everything(folder) == everything(npz)
    want = multiset(torch.from_numpy(images)[:, None].float() / 127.5 - 1, torch.from_numpy(labels))
    assert everything(npz) == want


def test_colour_pictures_become_channels_first(tmp_path):
    images = pictures(100, (4, 5, 3))
    np.savez(tmp_path / "rgb.npz", images=images)
    split = load_data(str(tmp_path / "rgb.npz"))
    assert split.train.images.shape == (90, 3, 4, 5) and split.train.num_classes == 1


def broken(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty folder":
        path.mkdir()
    elif kind == "sizes":
        path.mkdir()
        for i in range(100):
            Image.fromarray(pictures(1, (6, 6 + i % 2))[0]).save(path / f"{i}.png")
    elif kind == "not a picture":
        path.mkdir()
        (path / "a.png").write_text("hello")
    elif kind == "few.npz":
        np.savez(path, images=pictures(3))
    elif kind == "float.npz":
        np.savez(path, images=pictures().astype(np.float32))
    elif kind == "labels.npz":
        np.savez(path, images=pictures(), labels=np.arange(3))
    elif kind == "text.npz":
        path.write_text("hello")
    elif kind == "nothing.npz":
        np.savez(path, pictures=pictures())
    elif kind == "file.doc":
        path.write_text("hello")
    elif kind == "empty.npz":
        path.write_bytes(b"")
    elif kind == "array.npz":
        with path.open("wb") as file:
            np.save(file, pictures())
    elif kind == "scalar.npz":
        np.savez(path, images=np.uint8(3))
    elif kind == "channels.npz":
        np.savez(path, images=pictures(shape=(6, 6, 5)))
    elif kind == "lonely.npz":
        np.savez(path, images=pictures(), labels=np.r_[np.zeros(119, int), 300_000])
    elif kind == "float":
        path.mkdir()
        Image.fromarray(np.ones((6, 6), np.float32)).save(path / "float.tiff")
        (path / "float.tiff").rename(path / "float.png")
    return path


def test_sixteen_bits_are_scaled_and_transparency_lies_on_white(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    (tmp_path / "deep").mkdir()
    (tmp_path / "clear").mkdir()
    for i in range(100):
        Image.fromarray(ramp).save(tmp_path / "deep" / f"{i}.png")
        Image.new("RGBA", (4, 4), (255, 0, 0, 0 if i % 2 else 255)).save(tmp_path / "clear" / f"{i}.png")
    deep = load_data(str(tmp_path / "deep")).train.images[0, 0].flatten()
    torch.testing.assert_close(deep, torch.linspace(-1, 1, 64), rtol=0, atol=0.005)
    clear = load_data(str(tmp_path / "clear")).train.images[:, :, 0, 0]
    assert {tuple(colour.tolist()) for colour in clear} == {(1.0, -1.0, -1.0), (1.0, 1.0, 1.0)}


def test_many_tiny_classes_still_leave_something_held_out(tmp_path):
    np.savez(tmp_path / "tiny.npz", images=pictures(120), labels=np.arange(120) // 2)
    assert len(load_data(str(tmp_path / "tiny.npz")).heldout) == 12


def test_only_the_built_in_digits_are_judged_by_the_digits_classifier(tmp_path):
    from momatch.evaluation.builtin import classifier

    np.savez(tmp_path / "digits.npz", images=pictures(120, (8, 8)))
    assert classifier(load_data(str(tmp_path / "digits.npz")).heldout) is None
    assert classifier(load_digits().heldout) is not None


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no data at"),
        ("empty folder", "no pictures in"),
        ("sizes", "convert all pictures to one size"),
        ("not a picture", "cannot read the picture"),
        ("few.npz", "holds 3 pictures"),
        ("float.npz", "give uint8"),
        ("labels.npz", "one integer for each picture"),
        ("text.npz", "cannot read"),
        ("nothing.npz", "cannot read"),
        ("file.doc", "neither a folder"),
        ("empty.npz", "cannot read"),
        ("array.npz", "cannot read"),
        ("scalar.npz", "cannot read"),
        ("channels.npz", "5 channels"),
        ("lonely.npz", "labels from 0 to 300000"),
        ("float", "whose range is unknown"),
    ],
)
def test_unusable_data_is_named(tmp_path, kind, says):
    path = broken(tmp_path, kind)
    with pytest.raises(DataError, match=says) as error:
        load_data(str(path))
    assert kind.split(".")[0] in str(error.value) and "\n" not in str(error.value)
