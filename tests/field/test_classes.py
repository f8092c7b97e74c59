"""Which class each picture is of, in what order, and what is said of the rest."""

from __future__ import annotations

import json
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from small_files import put, tar

from momatch.data.image_io import DataError
from momatch.data.sources import load_data, open_collection
from momatch.utils.errors import Notice


def classes(source):
    """Level → label of every picture, and the names."""
    found = open_collection(str(source))
    items = [found.item(i) for i in range(len(found))]
    return {int(item.pixels[0, 0]): item.label for item in items}, list(found.class_names)


def in_a_folder(root, files):
    return put(root / "data", files)


def in_a_tar(root, files):
    return tar(root / "data.tar", files)


LAYOUTS = {
    "two classes": ({"cat/0.png": 10, "dog/0.png": 20}, {10: 0, 20: 1}, ["cat", "dog"]),
    "numbers are no words": (
        {f"{i}/0.png": i for i in range(12)},
        {i: i for i in range(12)},
        [str(i) for i in range(12)],
    ),
    "numbers with a gap keep their order": (
        {"2/0.png": 2, "10/0.png": 10, "9/0.png": 9},
        {2: 0, 9: 1, 10: 2},
        ["2", "9", "10"],
    ),
    "padded numbers": ({"002/0.png": 2, "010/0.png": 10}, {2: 0, 10: 1}, ["002", "010"]),
    "train and val": (
        {"train/cat/0.png": 1, "train/dog/0.png": 2, "val/cat/0.png": 3, "val/dog/0.png": 4},
        {1: 0, 2: 1, 3: 0, 4: 1},
        ["cat", "dog"],
    ),
    "Train and test, one class in one alone": (
        {"Train/cat/0.png": 1, "test/dog/0.png": 2, "test/cat/1.png": 3},
        {1: 0, 2: 1, 3: 0},
        ["cat", "dog"],
    ),
    "a class called test": ({"test/0.png": 1, "wood/0.png": 2}, {1: 0, 2: 1}, ["test", "wood"]),
    "a checkpoint folder of notebooks": (
        {"cat/0.png": 1, "dog/0.png": 2, ".ipynb_checkpoints/0-checkpoint.png": 3, "cat/.hidden.png": 4},
        {1: 0, 2: 1},
        ["cat", "dog"],
    ),
    "leavings of a Macintosh": (
        {"cat/0.png": 1, "dog/0.png": 2, "__MACOSX/cat/._0.png": b"x", "cat/._0.png": b"x"},
        {1: 0, 2: 1},
        ["cat", "dog"],
    ),
    "thumbnails of a disk station": (
        {"cat/0.png": 1, "cat/@eaDir/0.png/thumb.jpg": 7, "dog/0.png": 2},
        {1: 0, 2: 1},
        ["cat", "dog"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [in_a_folder, in_a_tar])
def test_folders_make_these_classes(tmp_path, layout, make):
    files, labels, names = LAYOUTS[layout]
    assert classes(make(tmp_path, files)) == (labels, names)


def test_train_and_test_alone_are_no_classes(tmp_path):
    labels, names = classes(put(tmp_path, {"train/0.png": 1, "test/0.png": 2}))
    assert labels == {1: 0, 2: 0} and not names


def test_a_linked_class_is_read_and_a_loop_is_not(tmp_path):
    put(tmp_path / "elsewhere", {"0.png": 20})
    root = put(tmp_path / "data", {"cat/0.png": 10})
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "again").symlink_to(root)
    (root / "cat" / "gone.png").symlink_to(root / "nothing.png")
    assert classes(root) == ({10: 0, 20: 1}, ["cat", "dog"])
    assert open_collection(str(root)).left_out == {"link to a folder above it": 1, "broken link": 1}


@pytest.mark.parametrize("suffix", [".jxl", ".JP2", ".heic", ".avif"])
def test_a_class_that_cannot_be_read_is_refused(tmp_path, suffix):
    put(tmp_path, {"cat/0.png": 1, "dog/0.png": 2, f"emu/0{suffix}": b"x", f"emu/1{suffix}": b"x"})
    with pytest.raises(DataError, match=f"emu holds 2 {suffix.lower()} .*convert them to PNG") as error:
        open_collection(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_of_other_pictures_beside_pictures_without_classes_is_left_out(tmp_path):
    found = open_collection(str(put(tmp_path, {"0.png": 1, "raw/0.heic": b"x"})))
    assert len(found) == 1 and found.left_out == {".heic": 1} and not found.class_names


def with_records(root, labels, table):
    files = {f"{i}.png": i for i in range(len(labels))}
    if table == "metadata.jsonl":
        lines = [json.dumps({"file_name": f"{i}.png", "label": label}) for i, label in enumerate(labels)]
    else:
        lines = ["file_name,label", *(f"{i}.png,{label}" for i, label in enumerate(labels))]
    return put(root, {**files, table: "\n".join(lines).encode()})


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([str(i) for i in range(12)], list(range(12)), [str(i) for i in range(12)]),
        (["10", "9", "2"], [2, 1, 0], ["2", "9", "10"]),
        (["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"]),
        ([0.0, 1.0, 1.0], [0, 1, 1], []),
        ([True, False, True], [1, 0, 1], []),
        ([5, 0, 10], [5, 0, 10], []),
    ],
)
def test_labels_of_records(tmp_path, labels, numbers, names):
    found = open_collection(str(with_records(tmp_path, labels, "metadata.jsonl")))
    assert list(found.labels) == numbers and list(found.class_names) == names


def test_numbers_in_a_table_of_texts_stay_numbers(tmp_path):
    found = open_collection(str(with_records(tmp_path, [3, 0, 11], "metadata.csv")))
    assert list(found.labels) == [3, 0, 11] and not found.class_names


def test_rows_without_a_label_are_left_out_and_counted(tmp_path):
    root = with_records(tmp_path, [0, 1, None, 1], "metadata.jsonl")
    found = open_collection(str(root))
    assert list(found.labels) == [0, 1, 1] and len(found) == 3 and found.item(2).pixels[0, 0] == 3
    assert "not read: 1 without a label, such as" in found.summary() and "line 3" in found.summary()
    with pytest.raises(DataError, match="nothing in its field 'label'; fill it in"):
        open_collection(str(with_records(tmp_path, [0, None, None, 1], "metadata.jsonl")))


@pytest.mark.parametrize("label", [1.5, float("nan"), 10**30, [1], {"a": 1}])
def test_a_label_that_is_none_is_named(tmp_path, label):
    with pytest.raises(DataError, match="labels are whole numbers from 0, or all texts"):
        open_collection(str(with_records(tmp_path, [0, 1, label], "metadata.jsonl")))


def many(root, labels):
    return with_records(root, labels, "metadata.jsonl")


def test_labels_of_a_larger_set(tmp_path):
    from momatch.data.reading import Reading

    source = str(many(tmp_path, [2, 999] * 60))
    with pytest.raises(DataError, match="labels from 2 to 999 on 120 .*--num-classes 1000"):
        load_data(source)
    split = load_data(source, reading=Reading(num_classes=1000))
    assert split.train.num_classes == 1000 and split.train.labels.unique().tolist() == [2, 999]
    with pytest.raises(DataError, match="and num_classes is 999"):
        load_data(source, reading=Reading(num_classes=999))


def test_what_is_read_and_left_out_is_said_in_one_line(tmp_path):
    files = {f"{name}/{i}.png": i for name, n in (("cat", 70), ("dog", 50)) for i in range(n)}
    others = {"cat/a.heic": b"x", "cat/b.HEIC": b"x", "notes.md": b"x", ".git/config": b"x", "LICENSE": b"x"}
    put(tmp_path, {**files, **others})
    with pytest.warns(Notice) as heard:
        split = load_data(str(tmp_path))
    assert [str(notice.message) for notice in heard] == [
        "read 120 pictures of 2 classes (cat 70, dog 50); left out 2 .heic, 1 .md, 1 file without an ending, "
        "1 hidden file"
    ]
    assert split.train.class_names == ("cat", "dog")


def test_pictures_without_anything_to_say_are_read_without_a_word(tmp_path):
    put(tmp_path, {f"{i}.png": i for i in range(100)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(str(tmp_path))


def test_one_grey_picture_among_colours(tmp_path):
    put(tmp_path, {"000.png": 7})
    for i in range(1, 100):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    with pytest.warns(Notice, match="1 grey among them are read as RGB"):
        split = load_data(str(tmp_path))
    levels = [image[:, 0, 0] for part in (split.train, split.heldout) for image in part.images]
    found = Counter(tuple(round(float(level + 1) * 127.5) for level in colour) for colour in levels)
    assert found == {(7, 7, 7): 1, **{(i, 0, 0): 1 for i in range(1, 100)}}


def arrays(shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "shape", "classes"),
    [
        ({"arr_0": arrays((100, 8, 8, 3))}, {}, (3, 8, 8), 1),
        ({"arr_0": arrays((100, 8, 8, 3))}, {"arr_1": np.arange(100) % 5}, (3, 8, 8), 5),
        ({"images": arrays((100, 8, 8, 3))}, {"labels": np.arange(100)[:, None] % 4}, (3, 8, 8), 4),
        ({"images": arrays((100, 8, 8))}, {"labels": (np.arange(100) % 3).astype(float)}, (1, 8, 8), 3),
        ({"images": arrays((100, 8, 8))}, {"labels": np.arange(100) % 2 == 1}, (1, 8, 8), 2),
        ({"images": arrays((100, 3, 8, 8))}, {}, (3, 8, 8), 1),
        ({"images": arrays((100, 1, 8, 6))}, {}, (1, 8, 6), 1),
        ({"images": arrays((100, 8, 8, 4))}, {}, (3, 8, 8), 1),
        ({"images": arrays((100, 4, 8, 8))}, {}, (3, 8, 8), 1),
    ],
)
def test_arrays_as_they_lie_around(tmp_path, images, labels, shape, classes):
    np.savez(tmp_path / "data.npz", **images, **labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        split = load_data(str(tmp_path / "data.npz"))
    assert split.train.images.shape[1:] == shape and split.train.num_classes == classes
    kept = next(iter(images.values()))
    if kept.ndim == 4 and kept.shape[3] == 3:
        want = kept.transpose(0, 3, 1, 2)
    elif kept.ndim == 3:
        want = kept[:, None]
    elif 4 in kept.shape[1:]:
        rgba = (kept if kept.shape[3] == 4 else kept.transpose(0, 2, 3, 1)).astype(float)
        want = (rgba[..., :3] - 255) * rgba[..., 3:] / 255 + 255
        want = want.transpose(0, 3, 1, 2)
    else:
        want = kept
    everything = sum(
        float(image.double().sum()) for part in (split.train, split.heldout) for image in part.images
    )
    assert everything == pytest.approx((want / 127.5 - 1).sum(), abs=want.size * 0.002)


def test_an_npz_with_other_names_says_which_it_has(tmp_path):
    np.savez(tmp_path / "data.npz", train_images=arrays((100, 8, 8)))
    with pytest.raises(DataError, match="it has train_images; rename the pictures' to images"):
        load_data(str(tmp_path / "data.npz"))


def stylegan(labels):
    return {"00000/img0.png": 10, "00000/img1.png": 20, "00001/img2.png": 30, "dataset.json": labels}


@pytest.mark.parametrize(
    ("labels", "wanted", "left_out"),
    [
        ([["00000/img0.png", 1], ["00000/img1.png", 0], ["00001/img2.png", 1]], {10: 1, 20: 0, 30: 1}, {}),
        ([["00000/img0.png", 1], ["00000/img1.png", 0]], {10: 1, 20: 0}, {".png": 1}),
        (None, {10: None, 20: None, 30: None}, {}),
    ],
)
def test_the_labels_of_a_dataset_json_count_and_its_folders_do_not(tmp_path, labels, wanted, left_out):
    root = put(tmp_path, stylegan(json.dumps({"labels": labels}).encode()))
    assert classes(root) == (wanted, []) and open_collection(str(root)).left_out == left_out


@pytest.mark.parametrize("contents", [b'{"images": []}', b"[]", b"not json", b"5"])
def test_another_dataset_json_is_left_out(tmp_path, contents):
    root = put(tmp_path, stylegan(contents))
    assert classes(root) == ({10: 0, 20: 0, 30: 1}, ["00000", "00001"])
    assert open_collection(str(root)).left_out == {".json": 1}


@pytest.mark.parametrize("labels", [[["a"]], [[1, 2]], 5, {"a": 1}])
def test_a_dataset_json_of_odd_labels_is_named(tmp_path, labels):
    with pytest.raises(DataError, match="dataset.json are no list of .file name, label.; repair it"):
        open_collection(str(put(tmp_path, stylegan(json.dumps({"labels": labels}).encode()))))


def test_labels_that_no_picture_has_are_said(tmp_path):
    found = open_collection(str(with_records(tmp_path, [1, 2, 5, 1], "metadata.jsonl")))
    assert found.summary() == "read 4 pictures; 3 of the labels 0 to 5 have no picture"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("data.rar", "nor a .tar, .zip or .parquet$"),
        ("metadata.jsonl", "; give its folder"),
        ("a.npy", "nor a .tar, .zip or .parquet$"),
    ],
)
def test_a_file_of_another_kind_says_what_to_do(tmp_path, name, says):
    with pytest.raises(DataError, match=says):
        open_collection(str(put(tmp_path, {name: b"x"}) / name))
