"""What a model says of its origin: a typed record, written to and read from model.json's "info"."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momatch.cli import main
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


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"role": "judge"}, "info.role is 'judge'"),
        ({"teacher": 3}, "info.teacher is 3, not a text"),
        ({"inputs": ["a"]}, "info.inputs is"),
        ({"inputs": {"data": 5}}, "info.data is 5"),
        ({"config": "digits-8"}, "info.config is 'digits-8', not an object"),
    ],
)
def test_a_wrong_type_is_named(entry, says):
    with pytest.raises(ValueError, match=says):
        from_json(entry)


def test_a_damaged_record_is_one_sentence_on_the_command_line(tmp_path, capsys):
    import momatch

    momatch.load_teacher("digits").save(tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"info": {"role": 7}}))
    assert main(["sample", str(tmp_path / "m"), "--num", "1", "--out", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert "info.role is 7" in said and said.count("\n") == 1
