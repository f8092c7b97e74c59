"""The command line as a person uses it: the whole way on a small budget, one sentence for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import momatch
from momatch.cli import main, progress
from momatch.diffusion.denoiser import Denoiser
from momatch.training import checkpoint

SMALL_TEACHER = [
    "--network.channels", "8", "16", "--network.attention-levels", "--sampling-steps", "4",
    "--train.num-steps", "6", "--train.batch-size", "8", "--train.log-every", "2",
    "--train.checkpoint-every", "3", "--monitor.every", "0",
]  # fmt: skip
SMALL_STUDENT = [
    "--train.num-steps", "6", "--train.batch-size", "8", "--train.log-every", "2", "--monitor.every", "3",
    "--monitor.num-samples", "100",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An .npz of 120 coloured pictures in three classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = (
        (rng.integers(0, 100, (120, 8, 8, 3)) + 70 * labels[:, None, None, None])
        .clip(0, 255)
        .astype(np.uint8)
    )
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    np.savez(path, images=images, labels=labels)
    return str(path)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "teacher")
    assert main(["train-teacher", "digits-teacher", "--out", out, "--data", data, *SMALL_TEACHER]) == 0
    return out


@pytest.fixture(scope="module")
def run(data, teacher, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "student")
    arguments = ["distill", "digits-4", "--out", out, "--teacher", teacher, "--data", data, *SMALL_STUDENT]
    assert main(arguments) == 0
    return out


def test_a_teacher_run_leaves_a_model_and_its_second_moments(teacher):
    model = momatch.load_teacher(teacher)
    moments = load_file(f"{teacher}/teacher/second-moments.safetensors")
    assert model.sample_shape == (3, 8, 8) and model.num_classes == 3 and model.steps == 4
    assert set(moments) == {f"network.{name}" for name, _ in model.denoiser.network.named_parameters()}
    assert all(bool((v >= 0).all()) for v in moments.values())


def test_the_whole_way(run, data, tmp_path, capsys):
    grid, arrays = tmp_path / "grid.png", tmp_path / "samples.npz"
    assert (
        main(
            [
                "sample",
                run,
                "--steps",
                "2",
                "--num",
                "9",
                "--labels",
                "0,2",
                "--seed",
                "7",
                "--out",
                str(grid),
            ]
        )
        == 0
    )
    assert main(["sample", run, "--num", "5", "--labels", "1,2", "--seed", "7", "--out", str(arrays)]) == 0
    assert Image.open(grid).size[0] > 24
    with np.load(arrays) as samples:
        assert samples["images"].shape == (5, 8, 8, 3) and samples["images"].dtype == np.uint8
        assert samples["labels"].tolist() == [1, 2, 1, 2, 1]
    assert main(["evaluate", run, "--steps", "1,4", "--teacher-steps", "4", "--num", "120"]) == 0
    said = capsys.readouterr().out
    assert "measured: student, 1 step\n" in said and "measured: student, 4 steps\n" in said
    rows = json.loads(open(f"{run}/evaluation.json").read())["rows"]
    assert [(row["name"], row["steps"]) for row in rows] == [("teacher", 4), ("student", 1), ("student", 4)]
    assert main(["evaluate", run, "--steps", "2", "--num", "120"]) == 0
    rows = json.loads(open(f"{run}/evaluation.json").read())["rows"]
    assert [(row["name"], row["steps"]) for row in rows][-2:] == [("student", 2), ("student", 4)] and len(
        rows
    ) == 4
    assert main(["report", run]) == 0
    assert "report.html" in capsys.readouterr().out
    metrics = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    assert [m["step"] for m in metrics if "gap" in m] == [2, 4, 6]
    assert [m["step"] for m in metrics if m.get("event") == "look"] == [3, 6]


def test_a_guidance_sweep_leaves_a_curve_and_its_figures(teacher, tmp_path, capsys):
    out = tmp_path / "curve.png"
    assert (
        main(["guidance", teacher, "--scales", "0,2", "--steps", "2", "--num", "120", "--out", str(out)]) == 0
    )
    assert Image.open(out).size[0] > 300 and "w = 2" in capsys.readouterr().out
    rows = json.loads(out.with_suffix(".json").read_text())
    values = [[m["value"] for m in row["result"]["measurements"] if m["metric"] == "frechet"] for row in rows]
    assert [row["scale"] for row in rows] == [0.0, 2.0] and values[0] != values[1]


def test_other_steps_than_a_student_was_made_for_are_noticed(run, tmp_path, capsys):
    out = ["--num", "1", "--out", str(tmp_path / "x.png")]
    assert main(["sample", run, *out]) == 0 and not capsys.readouterr().err
    assert main(["sample", run, "--steps", "1", *out]) == 0
    assert capsys.readouterr().err.startswith("momatch: this student was made for 4 steps, not for 1;")
    assert main(["sample", "digits", "--steps", "1", *out]) == 0 and not capsys.readouterr().err


def test_progress_of_sampling_is_told_off_a_terminal(run, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_EVERY_SECONDS", 0.0)
    assert main(["evaluate", run, "--num", "300"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sampling: ")]
    assert [line.partition("  ")[0] for line in told] == [
        "sampling: student, 4 steps: 256/300",
        "sampling: student, 4 steps: 300/300",
    ]
    assert all(re.fullmatch(r".*/300  \S+ pictures/s  \S+ s left", line) for line in told)


def test_evaluate_refuses_a_teacher_that_has_changed(run, teacher, tmp_path, capsys):
    model = momatch.load_teacher(teacher)
    kept = (Path(teacher) / "teacher" / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(model.denoiser.parameters()).add_(1.0)
    model.save(Path(teacher) / "teacher")
    try:
        assert main(["evaluate", run, "--teacher-steps", "4", "--num", "120"]) == 2
        assert "is not the teacher that" in capsys.readouterr().err
    finally:
        (Path(teacher) / "teacher" / "model.safetensors").write_bytes(kept)


def test_the_same_command_again_finishes_at_once_and_changes_nothing(run, teacher, data):
    before = momatch.load_student(run).sample(4, seed=1)
    assert (
        main(["distill", "digits-4", "--out", run, "--teacher", teacher, "--data", data, *SMALL_STUDENT]) == 0
    )
    assert torch.equal(before, momatch.load_student(run).sample(4, seed=1))


def test_a_saved_config_starts_the_same_run(run, tmp_path, capsys):
    out = str(tmp_path / "again")
    assert main(["distill", "--config", f"{run}/config.json", "--out", out]) == 0
    a, b = momatch.load_student(run), momatch.load_student(out)
    assert torch.equal(a.sample(4, seed=1), b.sample(4, seed=1))


def test_samples_are_a_function_of_the_seed(run):
    student = momatch.load_student(run)
    labels = {"label": torch.arange(300) % 3}
    whole = student.sample(300, cond=labels, seed=3)
    assert torch.equal(whole, student.sample(300, cond=labels, seed=3))
    assert not torch.equal(whole, student.sample(300, cond=labels, seed=4))
    fewer = student.sample(20, steps=1, cond={"label": torch.arange(20) % 3}, seed=3)
    torch.testing.assert_close(
        fewer, student.sample(300, steps=1, cond=labels, seed=3)[:20], rtol=1e-4, atol=1e-4
    )


MISTAKES = [
    (["frobnicate"], "unknown command 'frobnicate'"),
    (["distill"], "name a recipe"),
    (["distill", "digits-9", "--out", "{tmp}/a"], "unknown recipe 'digits-9'; did you mean digits-"),
    (
        ["distill", "emoji32-8", "--out", "{tmp}/a", "--teacher", "{tmp}/emoji32-teacher"],
        "train that teacher first, momatch train-teacher emoji32-teacher --out",
    ),
    (["distill", "digits-teacher", "--out", "{tmp}/a"], "momatch train-teacher"),
    (["distill", "--out", "{tmp}/a"], "name the recipe first"),
    (["distill", "digits-8"], "--out"),
    (["distill", "digits-8", "--out", "{tmp}/a", "--frob", "3"], "--frob"),
    (["distill", "digits-8", "--out", "{tmp}/a", "--steps", "eight"], "eight"),
    (["distill", "digits-8", "--out", "{tmp}/a", "--steps", "0"], "steps is 0; use 1 to 16"),
    (["distill", "digits-8", "--out", "{tmp}/a", "--steps", "17"], "steps is 17; use 1 to 16"),
    (["distill", "digits-8", "--out", "{tmp}/a", "--train.batch-size", "0"], "train.batch_size is 0"),
    (
        ["distill", "digits-8", "--out", "{tmp}/a", "--optim.learning-rate", "inf"],
        "optim.learning_rate is inf",
    ),
    (["distill", "digits-8", "--out", "{tmp}/a", "--optim.eps", "-1"], "optim.eps is -1"),
    (
        [
            "distill",
            "digits-8",
            "--out",
            "{tmp}/a",
            "--schedule.name",
            "interpolated",
            "--schedule.shift-high",
            "30",
        ],
        "not decreasing",
    ),
    (["distill", "digits-8", "--out", "{tmp}/a", "--data", "{tmp}/none"], "no data at"),
    (["distill", "digits-8", "--out", "{tmp}/a", "--data", "{tmp}/empty"], "no pictures in"),
    (["distill", "digits-8", "--out", "{tmp}/a", "--teacher", "{tmp}/none"], "there is no folder"),
    (["distill", "digits-8", "--out", "{tmp}/a", "--data", "{data}"], "the model makes (1, 8, 8)"),
    (["distill", "digits-8", "--out", "{tmp}/file/x"], "cannot write into"),
    (["distill", "digits-8", "--out", "{run}"], "holds a run of another config"),
    (["distill", "--config", "{tmp}/none.json", "--out", "{tmp}/a"], "cannot read the config"),
    (["train-teacher", "digits-8", "--out", "{tmp}/a"], "momatch distill"),
    (
        [
            "train-teacher",
            "digits-teacher",
            "--out",
            "{tmp}/a",
            "--network.channels",
            "8",
            "8",
            "8",
            "8",
            "8",
        ],
        "levels",
    ),
    (["train-teacher", "digits-teacher", "--out", "{tmp}/a", "--network.channels", "7"], "multiples of 8"),
    (["sample", "{tmp}/none"], "there is no folder"),
    (["sample", "{run}", "--steps", "0"], "steps must be at least 1, got 0"),
    (["sample", "{run}", "--steps", "17"], "got 17"),
    (["sample", "{run}", "--num", "0"], "got 0"),
    (["sample", "{run}", "--labels", "0,3"], "3 is out of range"),
    (["sample", "{run}", "--labels", "a"], "'a' is not a list"),
    (["sample", "{run}", "--seed", "-1"], "got -1"),
    (["sample", "{run}", "--eta", "2"], "--eta 2"),
    (["sample", "{run}", "--out", "{tmp}/x.gif"], ".png or .npy or .npz or .safetensors"),
    (["sample", "{run}", "--out", "{run}/config.json/x.png"], "cannot be made"),
    (["evaluate", "{run}", "--num", "3"], "too few"),
    (["evaluate", "{run}", "--data", "digits"], "the model makes (3, 8, 8); choose a teacher"),
    (["evaluate", "{run}", "--data", "emoji"], "makes (3, 8, 8); --image-size 8 reduces those of a folder"),
    (["evaluate", "digits", "--teacher-steps", "4"], "is no student"),
    (["plan", "--config", "{data}"], "cannot read the config"),
    (["evaluate", "{run}", "--steps", "1,b"], "'1,b' is not a list"),
    (["evaluate", "{run}", "--steps", "1,20"], "got 20"),
    (["guidance", "digits", "--scales", "0,x"], "'0,x' is not a list of numbers"),
    (["guidance", "digits", "--scales", "-1"], "guidance.scale is -1"),
    (["guidance", "digits", "--out", "{tmp}/x.gif"], ".png or .svg"),
    (["guidance", "digits", "--guidance.logsnr-min", "30"], "below guidance.logsnr_max"),
    (["guidance", "digits", "--num", "99"], "--num 99 is too few"),
    (["guidance", "{run}"], "is a student, its guidance is distilled in; give its teacher, "),
    (["report", "{tmp}"], "not the folder of a run"),
    (["plan", "digits-9"], "unknown recipe"),
    (["recipes", "x"], "takes no arguments"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_exit_code_2(arguments, says, run, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    filled = [a.format(tmp=tmp_path, run=run, data=data) for a in arguments]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(filled) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("momatch: ") and said.count("\n") == 1 and "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before, "a refused command must leave nothing behind"


WRONG_WORDS = {
    "sample runs/x --nmu 3": "sample does not take --nmu 3; did you mean --num? (see momatch sample --help)",
    "sample runs/x other": "sample does not take other (see momatch sample --help)",
    "sample runs/x --num a": "--num 'a' is not a whole number (see momatch sample --help)",
    "sample runs/x --eta a": "--eta 'a' is not a number (see momatch sample --help)",
    "sample runs/x --num": "--num needs a value (see momatch sample --help)",
    "sample": "sample needs RUN (see momatch sample --help)",
    "export runs/x": "export needs DIR (see momatch export --help)",
    "export runs/x y --format z": "--format 'z' is none of 'diffusers', 'onnx', 'torch' "
    "(see momatch export --help)",
    "prepare": "prepare needs SOURCE and --out PATH (see momatch prepare --help)",
    "distill digits-8 --otu x": "distill RECIPE does not take --otu x (see momatch distill RECIPE --help)",
    "guidance runs/x --guidance.scale 3": "guidance takes --scales, a list such as 0,1,2, in place of "
    "--guidance.scale",
}


@pytest.mark.parametrize("words", WRONG_WORDS)
def test_what_cannot_be_parsed_is_said_in_our_words(words, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"momatch: {WRONG_WORDS[words]}\n"


def test_several_wrong_words_are_one_sentence(capsys):
    assert main(["sample", "runs/x", "--nmu", "3", "--sede", "4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("momatch: sample does not take --nmu 3 --sede 4; did you mean --")
    assert "similar" not in said and said.count("\n") == 1


NAMES = {
    "sample": ["RUN", "--steps INT", "--labels STR"],
    "evaluate": ["RUN", "--steps STR", "--data STR"],
    "guidance": ["RUN", "--scales STR", "--guidance.clip"],
    "export": ["RUN", "DIR", "--license STR"],
    "report": ["RUN"],
    "prepare": ["SOURCE"],
}


@pytest.mark.parametrize("command", NAMES)
def test_help_names_what_it_takes(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    usage = said.partition("\n\n")[0]
    assert all(name in said for name in NAMES[command])
    assert not any(odd in said for odd in ("PATH PATH", "{None}", "default: None", "--guidance.scale FLOAT"))
    assert all(name in usage.split() for name in NAMES[command] if name.isupper())


def test_a_damaged_model_is_refused(run, tmp_path, capsys):
    import shutil

    flipped = bytearray(Path(f"{run}/student/model.safetensors").read_bytes())
    flipped[-100] ^= 1
    for name, content in (
        ("model.safetensors", b"short"),
        ("model.safetensors", None),
        ("model.json", b"{"),
        ("model.json", b'{"format": "x"}'),
    ):
        copy = tmp_path / "student"
        shutil.copytree(f"{run}/student", copy, dirs_exist_ok=True)
        (copy / name).write_bytes(content or flipped)
        assert main(["sample", str(copy), "--out", str(tmp_path / "x.png")]) == 2
        said = capsys.readouterr().err
        assert str(copy) in said and said.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_a_damaged_checkpoint_is_refused_and_left_alone(teacher, data, tmp_path, capsys):
    arguments = ["distill", "digits-4", "--out", str(tmp_path / "r"), "--teacher", teacher, "--data", data]
    arguments += SMALL_STUDENT
    assert main(arguments) == 0
    newest = checkpoint.paths(tmp_path / "r" / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert str(newest) in said and "delete it" in said and newest.stat().st_size == 1000


def test_running_out_of_memory_is_said_in_a_sentence(run, tmp_path, capsys):
    arguments = ["sample", run, "--num", "999999999999", "--labels", "1", "--out", str(tmp_path / "x.png")]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "out of memory" in said and "--batch-size" in said and not (tmp_path / "x.png").exists()


def test_batch_size_reaches_the_network(run, tmp_path, monkeypatch):
    sizes, forward = set(), Denoiser.forward
    monkeypatch.setattr(
        Denoiser, "forward", lambda self, z, *rest: (sizes.add(len(z)), forward(self, z, *rest))[1]
    )
    for command, options in (
        ("sample", ["--num", "40", "--out", str(tmp_path / "x.png")]),
        ("evaluate", ["--num", "100", "--steps", "1"]),
    ):
        sizes.clear()
        assert main([command, run, *options, "--batch-size", "17"]) == 0
        assert max(sizes) == 17
        assert main([command, run, *options, "--batch-size", "0"]) == 2


def test_batch_size_of_guidance_reaches_the_network(teacher, tmp_path, monkeypatch):
    sizes, forward = set(), Denoiser.forward
    monkeypatch.setattr(
        Denoiser, "forward", lambda self, z, *rest: (sizes.add(len(z)), forward(self, z, *rest))[1]
    )
    options = ["--num", "100", "--scales", "0", "--steps", "1", "--out", str(tmp_path / "curve.png")]
    assert main(["guidance", teacher, *options, "--batch-size", "17"]) == 0 and max(sizes) == 17


def test_help_and_version(capsys):
    for arguments in ([], ["--help"], ["--version"], ["recipes"]):
        assert main(arguments) == 0
    with pytest.raises(SystemExit) as stop:
        main(["distill", "digits-8", "--help"])
    assert not stop.value.code and "--weighting.name" in capsys.readouterr().out
