"""Strays, partial captions, records beside pictures, labels of a larger set; what a run is told of them."""

from __future__ import annotations

import json
import shlex
import warnings
from dataclasses import replace

import numpy as np
import pytest
from diffusers import DDPMScheduler
from small_files import png, put, tar
from test_formats import zipped
from test_teachers import checkpoint

from momatch.cli import main
from momatch.cli.conditions import label_cond
from momatch.cli.evaluate import data_for
from momatch.cli.inspect import InspectArguments
from momatch.cli.parsing import parse
from momatch.cli.train import as_options
from momatch.config import DistillConfig, Reading, TeacherConfig, to_json
from momatch.config.files import from_json
from momatch.data.image_io import DataError
from momatch.data.sources import load_data, open_collection
from momatch.interop.load import load_any, teacher_of_student
from momatch.interop.prepare import PrepareConfig
from momatch.models.model import ModelError
from momatch.models.provenance import Provenance
from momatch.training.build import teacher_of
from momatch.utils.errors import ConfigError, Notice, UsageError
from tiny_models import make_teacher


def items(source, **reading):
    """Level → (label, caption)."""
    found = open_collection(str(source), Reading(**reading))
    read = [found.item(i) for i in range(len(found))]
    return {int(item.pixels[0, 0]): (item.label, item.caption) for item in read}


def a_folder(root, files):
    return put(root / "data", files)


def a_tar(root, files):
    return tar(root / "data.tar", files)


def a_zip(root, files):
    return zipped(root / "data.zip", files)


MAKERS = [a_folder, a_tar, a_zip]
PAIR = {"cat/0.png": 10, "dog/0.png": 20}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("files", "names", "strays"),
    [
        ({**PAIR, "x.png": 30}, ["cat", "dog"], 1),
        ({"top/cat/0.png": 10, "top/dog/0.png": 20, "top/x.png": 30}, ["cat", "dog"], 1),
        ({"train/cat/0.png": 10, "val/dog/0.png": 20, "x.png": 30}, ["cat", "dog"], 1),
        ({"9/0.png": 10, "10/0.png": 20, "x.png": 30}, ["9", "10"], 1),
    ],
)
def test_pictures_beside_the_class_folders_are_left_out_and_counted(tmp_path, make, files, names, strays):
    source = make(tmp_path, files)
    found = open_collection(str(source))
    assert items(source) == {10: (0, None), 20: (1, None)} and list(found.class_names) == names
    assert found.left_out == {"picture beside the class folders": strays}
    assert found.summary().endswith("; left out 1 picture beside the class folders")


def test_several_strays_are_said_in_the_plural(tmp_path):
    files = {f"{name}/{i}.png": i for name in ("cat", "dog") for i in range(3)} | {"x.png": 8, "y.png": 9}
    assert (
        open_collection(str(a_folder(tmp_path, files)))
        .summary()
        .endswith("left out 2 pictures beside the class folders")
    )


@pytest.mark.parametrize("make", MAKERS)
def test_as_many_strays_as_pictures_in_folders_are_refused(tmp_path, make):
    source = make(tmp_path, {**PAIR, "a.png": 1, "b.png": 2})
    with pytest.raises(DataError, match="holds 2 pictures beside folders with 2; put them into a folder of"):
        open_collection(str(source))


def test_strays_with_labels_of_their_own_are_read(tmp_path):
    files = {**PAIR, "x.png": 30} | {f"{key}.cls": b"3" for key in ("cat/0", "dog/0", "x")}
    assert items(a_folder(tmp_path, files)) == {10: (3, None), 20: (3, None), 30: (3, None)}


PICTURES = {"0.png": 0, "1.png": 1}
BESIDE = {
    "txt": ({"0.txt": b"a cat", "1.txt": b"a dog\n"}, {0: (0, "a cat"), 1: (0, "a dog")}),
    "caption before txt": (
        {"0.txt": b"x", "0.caption": b"a cat", "1.caption": b"a dog"},
        {0: (0, "a cat"), 1: (0, "a dog")},
    ),
    "json": (
        {"0.json": b'{"caption": "a cat", "w": 4}', "1.json": b'{"caption": "a dog"}'},
        {0: (0, "a cat"), 1: (0, "a dog")},
    ),
    "json with labels": (
        {"0.json": b'{"text": "a cat", "label": 1}', "1.json": b'{"text": "a dog", "label": 0}'},
        {0: (1, "a cat"), 1: (0, "a dog")},
    ),
    "cls": ({"0.cls": b"2", "1.cls": b"0\n"}, {0: (2, None), 1: (0, None)}),
    "cls of names, and txt": (
        {"0.cls": b"dog", "1.cls": b"cat", "0.txt": b"it", "1.txt": b"that"},
        {0: (1, "it"), 1: (0, "that")},
    ),
    "boxes": ({"0.json": b"[[1, 2, 3, 4]]", "1.json": b"[]"}, {0: (0, None), 1: (0, None)}),
}


@pytest.mark.parametrize("way", BESIDE)
@pytest.mark.parametrize("make", [a_folder, a_zip])
def test_what_lies_beside_a_picture_is_its_caption_and_label(tmp_path, way, make):
    beside, wanted = BESIDE[way]
    source = make(tmp_path, {**PICTURES, **beside})
    assert items(source) == wanted
    left = {"caption before txt": {".txt": 1}, "boxes": {".json": 2}}
    assert open_collection(str(source)).left_out == left.get(way, {})


@pytest.mark.parametrize("changed", ["0.cls", "0.json"])
def test_other_records_beside_pictures_are_other_data(tmp_path, changed):
    beside = {"0.cls": b"1", "1.cls": b"0", "0.json": b'{"text": "a"}', "1.json": b'{"text": "b"}'}
    before = open_collection(str(a_folder(tmp_path, {**PICTURES, **beside}))).identity()
    put(tmp_path / "data", {changed: beside[changed].replace(b"1", b"2").replace(b'"a"', b'"c"')})
    assert open_collection(str(tmp_path / "data")).identity() != before


def test_a_damaged_record_beside_a_picture_is_named(tmp_path):
    with pytest.raises(DataError, match="record of .*0.png is damaged .*repair or remove it"):
        open_collection(str(a_folder(tmp_path, {**PICTURES, "0.json": b"{"})))


PARTIAL = {
    "folder": (a_folder, {**PICTURES, "1.txt": b"a dog"}),
    "folder of json": (
        a_folder,
        {**PICTURES, "0.json": b'{"other": 1}', "1.json": b'{"text": "a dog"}'},
    ),
    "zip": (a_zip, {**PICTURES, "1.txt": b"a dog"}),
    "tar": (a_tar, {**PICTURES, "1.txt": b"a dog"}),
    "tar with labels": (a_tar, {**PICTURES, "1.txt": b"a dog", "0.cls": b"0", "1.cls": b"0"}),
    "metadata.jsonl": (
        a_folder,
        {**PICTURES, "metadata.jsonl": b'{"file_name": "0.png"}\n{"file_name": "1.png", "text": "a dog"}'},
    ),
    "metadata.csv": (a_folder, {**PICTURES, "metadata.csv": b"file_name,text\n0.png,\n1.png,a dog\n"}),
}


@pytest.mark.parametrize("way", PARTIAL)
def test_where_some_lack_a_caption_they_have_the_empty_one_if_that_is_allowed(tmp_path, way):
    make, files = PARTIAL[way]
    source = make(tmp_path, files)
    read = items(source, empty_captions=True)
    assert {level: caption for level, (_, caption) in read.items()} == {0: "", 1: "a dog"}
    found = open_collection(str(source), Reading(empty_captions=True))
    assert found.has_captions and "1 without a caption have the empty one" in found.summary()


def test_without_being_allowed_they_are_counted(tmp_path):
    found = open_collection(str(a_folder(tmp_path, {**PICTURES, "2.png": 2, "1.txt": b"a", "2.txt": b"b"})))
    assert (
        not found.has_captions
        and "2 have a caption in a file beside them, which is not read" in found.notes[0]
    )
    assert "--empty-captions" in found.notes[0] and "--empty-captions" in found.caption_help


def test_empty_captions_change_nothing_where_all_or_none_have_one(tmp_path):
    for files in (PICTURES, {**PICTURES, "0.txt": b"a", "1.txt": b"b"}):
        source = str(a_folder(tmp_path, files))
        allowed, not_allowed = (open_collection(source, Reading(empty_captions=e)) for e in (True, False))
        assert allowed.has_captions == not_allowed.has_captions and not allowed.notes


def with_labels(root, labels, kind):
    """Pictures with these labels; the level says which."""
    n = len(labels)
    if kind == "npz":
        np.savez(
            root / "data.npz",
            images=np.arange(n, dtype=np.uint8)[:, None, None] + np.zeros((n, 4, 4), np.uint8),
            labels=labels,
        )
        return root / "data.npz"
    if kind == "metadata":
        lines = [json.dumps({"file_name": f"{i}.png", "label": label}) for i, label in enumerate(labels)]
        files = {f"{i}.png": i for i in range(n)}
        return put(root / "data", {**files, "metadata.jsonl": "\n".join(lines).encode()})
    files = {f"{i}.png": i for i in range(n)} | {
        f"{i}.cls": str(label).encode() for i, label in enumerate(labels)
    }
    return {"tar": a_tar, "beside": a_folder}[kind](root, files)


@pytest.mark.parametrize("kind", ["npz", "metadata", "tar", "beside"])
def test_labels_of_a_larger_set_are_refused_or_numbered_anew(tmp_path, kind):
    labels = [2, 999, 7] * 40
    source = str(with_labels(tmp_path, labels, kind))
    with pytest.raises(DataError, match=r"from 2 to 999 on 120 .*--num-classes 1000, .*--renumber-labels"):
        load_data(source)
    with pytest.warns(
        Notice, match=r"3 classes \(2 40, 7 40, 999 40\); labels 2 to 999 are numbered anew, 0 to 2"
    ):
        split = load_data(source, reading=Reading(renumber_labels=True))
    assert split.train.num_classes == 3 and split.train.class_names == ("2", "7", "999")
    for part in (split.train, split.heldout):
        levels = ((part.images[:][:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
        assert part.labels.tolist() == [{2: 0, 7: 1, 999: 2}[labels[level]] for level in levels]


def test_classes_of_names_keep_them_and_numbers_in_order_stay(tmp_path):
    found = open_collection(str(a_folder(tmp_path, PAIR)), Reading(renumber_labels=True))
    assert list(found.class_names) == ["cat", "dog"] and list(found.labels) == [0, 1] and not found.notes


def test_numbers_and_new_numbers_at_once_are_refused():
    with pytest.raises(
        ConfigError, match="num_classes is 5; labels that are numbered anew are counted; leave"
    ):
        Reading(num_classes=5, renumber_labels=True)


OPTIONS = ["--num-classes", "3", "--max-megapixels", "1", "--anywhere", "--empty-captions"]
WANTED = Reading(num_classes=3, max_megapixels=1, anywhere=True, empty_captions=True)


@pytest.fixture
def elsewhere(tmp_path):
    """Pictures outside the folder that names them, of two labels of three."""
    put(tmp_path / "elsewhere", {f"{i}.png": png(i, (8, 8)) for i in range(100)})
    lines = [
        json.dumps(
            {"file_name": f"../elsewhere/{i}.png", "label": 2 * (i % 2), **({"text": "it"} if i else {})}
        )
        for i in range(100)
    ]
    return put(tmp_path / "data", {"metadata.jsonl": "\n".join(lines).encode()})


SHORT = ["--train.num-steps", "2", "--train.batch-size", "4", "--monitor.every", "0", "--device", "cpu"]


def test_a_run_is_told_how_to_read_its_data_and_writes_it_down(tmp_path, elsewhere, capsys):
    run = tmp_path / "run"
    words = ["train-teacher", "digits-teacher", "--data", str(elsewhere), *SHORT, "--out", str(run)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        assert main(words) == 2 and "lies outside" in capsys.readouterr().err
        assert main([*words, *OPTIONS]) == 0
    assert (
        json.loads((run / "config.json").read_text())["reading"]
        == to_json(TeacherConfig(reading=WANTED))["reading"]
    )
    model = load_any(run)
    assert model.num_classes == 3
    following = capsys.readouterr().out
    assert " ".join(as_options(WANTED)) in " ".join(following.split())
    with pytest.warns(Notice):
        assert data_for(model, None).train.num_classes == 3, "as it was read for training"


@pytest.mark.parametrize("kind", [TeacherConfig, DistillConfig])
def test_configs_of_before_there_was_a_reading_open(kind):
    fields = to_json(kind())
    fields.pop("reading")
    fields.pop("scheduler", None)
    assert from_json(fields, kind) == kind()
    assert from_json(to_json(kind(reading=WANTED)), kind).reading == WANTED


def test_options_are_said_as_they_were_given():
    every = Reading("a b", "c", 0, True, True, 3, True, 5)
    words = as_options(every)
    assert words == [
        *("--caption-field", "'a b'", "--label-field", "c", "--renumber-labels", "--empty-captions"),
        *("--max-megapixels", "3", "--anywhere", "--skip-unreadable", "5"),
    ]
    read = parse(InspectArguments, ["x", *shlex.split(" ".join(words))], "inspect").reading
    assert read == every and as_options(Reading()) == []


def test_a_scheduler_from_elsewhere_for_a_teacher_of_diffusers(tmp_path):
    part = checkpoint(tmp_path / "out", averaged=False, whole=False)
    DDPMScheduler(num_train_timesteps=500).save_pretrained(tmp_path / "noise")
    config = DistillConfig(teacher=str(part), scheduler=str(tmp_path / "noise"))
    with pytest.raises(ModelError, match="does not say with what noise"):
        teacher_of(DistillConfig(teacher=str(part)))
    assert len(teacher_of(config).schedule.options["betas"]) == 500
    student = replace(load_any("digits"), provenance=Provenance("student", str(part), config=to_json(config)))
    assert len(teacher_of_student(student).schedule.options["betas"]) == 500
    with pytest.raises(UsageError, match="are for teachers of diffusers"):
        teacher_of(DistillConfig(scheduler=str(tmp_path)))


def test_prepare_takes_every_option_of_reading():
    options = {"num_classes": 3, "empty_captions": True, "max_megapixels": 1, "anywhere": True}
    assert PrepareConfig(**options).reading == WANTED
    assert PrepareConfig(renumber_labels=True).reading == Reading(renumber_labels=True)


def test_labels_may_be_asked_for_by_name():
    model = replace(make_teacher(), provenance=Provenance(role="teacher", class_names=("cat", "dog", "7")))
    assert label_cond("dog,cat", 5, model)["label"].tolist() == [1, 0, 1, 0, 1]
    assert label_cond("2, cat", 2, model)["label"].tolist() == [2, 0]
    for labels, sentence in {
        "cow": "this model has no class 'cow'; it has cat, dog, 7",
        "7": "7 is out of range",  # a number is a number, whatever classes are called
        "-1": "-1 is out of range",
        "--1": "is not a list of whole numbers",
    }.items():
        with pytest.raises(UsageError, match=sentence):
            label_cond(labels, 2, model)
