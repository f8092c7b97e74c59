"""`momatch prepare` on people's files: classes keep their names, and options reach the reading."""

from __future__ import annotations

import json

import pytest
from small_files import put
from test_teachers import pipeline

from momatch.cli import main
from momatch.data.sources import load_data
from momatch.interop.prepare import PrepareConfig, prepare
from momatch.utils.errors import Notice, UsageError


def prepared(source, tmp_path, **options):
    config = PrepareConfig(str(pipeline(tmp_path / "pipe")), 8, **options)
    for _ in prepare(str(source), config, tmp_path / "out"):
        pass
    return load_data(str(tmp_path / "out"))


def test_classes_keep_their_order_and_names(tmp_path):
    files = {f"{name}/{i}.png": int(name) for name in ("2", "10", "9") for i in range(40)}
    with pytest.warns(Notice, match=r"120 pictures of 3 classes \(2 40, 9 40, 10 40\); left out 1 .heic"):
        split = prepared(put(tmp_path / "data", {**files, "2/a.heic": b"x"}), tmp_path)
    assert split.train.class_names == ("2", "9", "10") and split.train.num_classes == 3
    levels = ((split.train.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert {(level, int(label)) for level, label in zip(levels, split.train.labels, strict=True)} == {
        (2, 0),
        (9, 1),
        (10, 2),
    }


def records(root, names, labels):
    lines = [json.dumps({"file_name": n, "label": y}) for n, y in zip(names, labels, strict=True)]
    return put(root, {"metadata.jsonl": "\n".join(lines).encode()})


def test_labels_of_a_larger_set_and_pictures_elsewhere(tmp_path):
    elsewhere = put(tmp_path / "elsewhere", {f"{i}.png": i for i in range(100)})
    labels = [2 + 997 * (i % 2) for i in range(100)]
    source = records(tmp_path / "data", [str(elsewhere / f"{i}.png") for i in range(100)], labels)
    with pytest.raises(UsageError, match="lies outside .*--anywhere"):
        prepared(source, tmp_path)
    with pytest.raises(UsageError, match="labels from 2 to 999 on 100 pictures.*--num-classes 1000"):
        prepared(source, tmp_path, anywhere=True)
    with pytest.warns(Notice, match="998 of the labels 0 to 999 have no picture"):
        split = prepared(source, tmp_path, anywhere=True, num_classes=1000)
    assert split.train.num_classes == 1000 and sorted(set(split.train.labels.tolist())) == [2, 999]


def test_absolute_names_inside_the_folder(tmp_path):
    root = put(tmp_path / "data", {f"{i}.png": i for i in range(100)})
    source = records(root, [str(root / f"{i}.png") for i in range(100)], [i % 2 for i in range(100)])
    split = prepared(source, tmp_path)
    assert len(split.train) + len(split.heldout) == 100 and split.train.num_classes == 2


@pytest.mark.parametrize("option", ["--num-classes", "--max-megapixels"])
def test_odd_numbers_are_refused(tmp_path, capsys, option):
    root = put(tmp_path / "data", {"0.png": 0})
    arguments = ["prepare", root, "--out", tmp_path / "out", "--teacher", pipeline(tmp_path / "pipe")]
    assert main([*map(str, arguments), option, "-1"]) == 2
    assert "is -1; it must be at least 1, or left out" in capsys.readouterr().err
