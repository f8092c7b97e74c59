"""What a model says of its origin: a typed record, written to and read from model.json's "info"."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import momatch
from momatch.cli import main
from momatch.config.schema import distilled_guidance
from momatch.interop.load import teacher_of_student
from momatch.models.model import Model, ModelError, Student, load_model
from momatch.models.provenance import Inputs, Provenance, from_json

TEXT = st.none() | st.text(min_size=1)
RECORDS = st.builds(
    Provenance,
    role=st.sampled_from([None, "teacher", "student"]),
    teacher=TEXT,
    data=TEXT,
    config=st.dictionaries(st.text(), st.integers()),
    inputs=st.builds(Inputs, TEXT, TEXT),
    pipeline=TEXT,
    scheduler=TEXT,
    text_encoder=TEXT,
    latent=st.booleans(),
    class_names=st.lists(st.text()).map(tuple),
)


@given(RECORDS)
def test_a_record_survives_json(record):
    assert from_json(json.loads(json.dumps(record.to_json()))) == record


def test_what_earlier_versions_wrote_is_read():
    old = {
        "role": "teacher",
        "pipeline": "p",
        "vae": {"scaling_factor": 0.5},
        "colour": "blue",
        "image_size": 64,
    }
    assert from_json(old) == Provenance("teacher", pipeline="p", latent=True)
    assert from_json({}) == Provenance()
    assert from_json({"config": None, "inputs": None, "class_names": None, "vae": None}) == Provenance()


VAE = {"scaling_factor": 0.18215, "shift_factor": 0.0}
INPUTS = {"teacher": "0123456789abcdef", "data": "fedcba9876543210"}
CONFIG = {"kind": "distill", "guidance": {"scale": 2.0}, "image_size": 16}
WRITTEN_BEFORE = [  # as the code before the record wrote them
    {"role": "teacher", "data": "digits", "config": CONFIG, "inputs": {"data": INPUTS["data"]}},
    {"role": "teacher", "pipeline": "/p", "scheduler": "DDPMScheduler", "vae": VAE},
    {
        "role": "student",
        "teacher": "/p",
        "data": "d",
        "config": CONFIG,
        "inputs": INPUTS,
        "pipeline": "/p",
        "vae": VAE,
    },
    {
        "role": "student",
        "teacher": "t",
        "data": "emoji",
        "config": CONFIG,
        "inputs": INPUTS,
        "text_encoder": "minilm",
    },
]


@pytest.mark.parametrize("info", WRITTEN_BEFORE)
def test_a_folder_of_an_earlier_version_opens_and_is_written_with_the_same_entries(tmp_path, info):
    """Earlier versions then find what they look for: "vae" tells them that samples are latents."""
    momatch.load_teacher("digits").save(tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"info": info}))
    model = load_model(tmp_path / "m")
    assert model.is_student == isinstance(model, Student) == (info["role"] == "student")
    assert model.provenance.latent == ("vae" in info)
    assert distilled_guidance(model).scale == (2.0 if "config" in info else 0.0)
    model.save(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "model.json").read_text())["info"]
    assert set(written) == set(info) and bool(written.get("vae")) == bool(info.get("vae"))
    assert {k: v for k, v in written.items() if k != "vae"} == {k: v for k, v in info.items() if k != "vae"}


def test_user_code_that_says_info_goes_on_working():
    teacher = momatch.load_teacher("digits")
    parts = (teacher.denoiser, teacher.network, teacher.schedule, teacher.sample_shape)
    info = {"role": "teacher", "pipeline": "p", "vae": VAE}
    record = Provenance("teacher", pipeline="p", latent=True)
    assert Model(*parts, steps=4, info=info).provenance == record
    assert Model(*parts, 4, 0, info).provenance == record  # by place, as it could be
    assert replace(teacher, info=info).provenance == record
    assert replace(replace(teacher, info=info), steps=3).provenance == record
    with pytest.raises(ModelError, match="info.role is 'judge'"):
        Model(*parts, steps=4, info={"role": "judge"})


def test_info_is_a_copy():
    model = replace(
        momatch.load_teacher("digits"), provenance=Provenance(config={"guidance": {"scale": 1.0}})
    )
    model.info["config"]["guidance"]["scale"] = 9.0
    assert model.provenance.config == {"guidance": {"scale": 1.0}}
    with pytest.raises(AttributeError):
        model.info = {}  # pyright: ignore[reportAttributeAccessIssue]


def test_a_student_is_one_whatever_its_info_says(tmp_path):
    teacher = momatch.load_teacher("digits")
    parts = (teacher.denoiser, teacher.network, teacher.schedule, teacher.sample_shape)
    student = Student(*parts, steps=2, num_classes=teacher.num_classes)
    assert student.is_student and replace(student, provenance={"role": "teacher"}).is_student
    student.save(tmp_path / "s")
    assert isinstance(momatch.load_student(tmp_path / "s"), Student)


def test_a_student_that_names_no_teacher_says_so():
    student = replace(momatch.load_teacher("digits"), provenance=Provenance("student"))
    with pytest.raises(ModelError, match="does not say which teacher it was distilled from"):
        teacher_of_student(student)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"role": "judge"}, "info.role is 'judge'"),
        ({"teacher": 3}, "info.teacher is 3, not a text"),
        ({"inputs": ["a"]}, "info.inputs is"),
        ({"inputs": {"data": 5}}, "info.data is 5"),
        ({"config": "digits-8"}, "info.config is 'digits-8', not an object"),
        ({"latent": "no"}, "info.latent is 'no', neither true nor false"),
        ({"vae": 0.18}, "info.vae is 0.18"),
        ({"class_names": "cat"}, "info.class_names is 'cat', not a list"),
        ([], "info is .., not an object"),
    ],
)
def test_a_wrong_type_is_named(entry, says):
    with pytest.raises(ValueError, match=says):
        from_json(entry)


def test_a_damaged_record_is_one_sentence_on_the_command_line(tmp_path, capsys):
    momatch.load_teacher("digits").save(tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"info": {"role": 7}}))
    assert main(["sample", str(tmp_path / "m"), "--num", "1", "--out", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert "info.role is 7" in said and said.count("\n") == 1
