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


def pictures(n=40, shape=(6, 6)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def test_folder_and_npz_of_the_same_pictures_agree(tmp_path):
    images, labels = pictures(), np.arange(40) % 2
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
    assert len(folder.heldout) == len(npz.heldout) == 4

    def multiset(images, labels):
        return sorted((int(y), *x.flatten().tolist()) for x, y in zip(images, labels, strict=True))

    def everything(split):
        images = torch.cat([split.train.images, split.heldout.images])
        return multiset(images, torch.cat([split.train.labels, split.heldout.labels]))

    assert everything(folder) == everything(npz)
    want = multiset(torch.from_numpy(images)[:, None].float() / 127.5 - 1, torch.from_numpy(labels))
    assert everything(npz) == want


def test_colour_pictures_become_channels_first(tmp_path):
    images = pictures(30, (4, 5, 3))
    np.savez(tmp_path / "rgb.npz", images=images)
    split = load_data(str(tmp_path / "rgb.npz"))
    assert split.train.images.shape == (27, 3, 4, 5) and split.train.num_classes == 1


def broken(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty folder":
        path.mkdir()
    elif kind == "sizes":
        path.mkdir()
        for i in range(30):
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
    elif kind == "file.txt":
        path.write_text("hello")
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no data at"),
        ("empty folder", "no pictures in"),
        ("sizes", "make all pictures alike"),
        ("not a picture", "cannot read the picture"),
        ("few.npz", "holds 3 pictures"),
        ("float.npz", "give uint8"),
        ("labels.npz", "one integer for each picture"),
        ("text.npz", "cannot read"),
        ("nothing.npz", "cannot read"),
        ("file.txt", "neither a folder"),
    ],
)
def test_unusable_data_is_named(tmp_path, kind, says):
    path = broken(tmp_path, kind)
    with pytest.raises(DataError, match=says) as error:
        load_data(str(path))
    assert kind.split(".")[0] in str(error.value) and "\n" not in str(error.value)
