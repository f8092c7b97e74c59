"""Data that are no pictures: read, held out by group, and through every command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import momatch
from momatch import cli
from momatch.config.schema import GuidanceConfig, MonitorConfig, TrainConfig
from momatch.data.images import ImageSet, Split
from momatch.data.reading import Reading
from momatch.data.sources import load_data
from momatch.evaluation import vectors
from momatch.networks.configs import MLPConfig
from momatch.networks.mlp import MLP
from momatch.training.build import teacher_training
from momatch.utils.errors import Notice, UsageError

N, SHAPE = 300, (8, 2)
QUICK = "--train.num-steps 4 --train.batch-size 16".split()


def arrays(seed=0, n=N):
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(n, 3)).astype("float32")
    x = rng.normal(size=(n, *SHAPE)).astype("float32") + 0.3 * obs[:, :1, None]
    return {"x": x, "obs": obs, "goal": rng.normal(size=(n, 2, 2)).astype("float32")}


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "paths.npz", **arrays(), group=np.arange(N) // 10)
    return tmp_path / "paths.npz"


def test_arrays_are_read_and_groups_held_out_whole(file, tmp_path):
    given, split = arrays(), load_data(str(file))
    assert split.train.space == "vectors" and split.train.images.shape == (270, *SHAPE)
    assert len(split.heldout) == 30 and set(split.train.conditions) == {"obs", "goal"}
    rows = {row.tobytes(): i for i, row in enumerate(given["x"])}
    train, held = (
        [rows[row.numpy().tobytes()] for row in part.images] for part in (split.train, split.heldout)
    )
    assert not {i // 10 for i in train} & {i // 10 for i in held}
    for part, index in ((split.train, train), (split.heldout, held)):
        assert np.array_equal(part.conditions["obs"].numpy(), given["obs"][index])
        assert np.array_equal(part.conditions["goal"].numpy(), given["goal"][index])
    again = load_data(str(file)).heldout
    assert torch.equal(again.images, split.heldout.images)
    half = {name: torch.from_numpy(rows).to(torch.bfloat16) for name, rows in given.items()}
    save_file(half, tmp_path / "paths.safetensors")
    other = load_data(str(tmp_path / "paths.safetensors"))
    assert len(other.heldout) == 30 and other.train.images.dtype == torch.float32


def test_labels_are_classes(tmp_path):
    np.savez(tmp_path / "a.npz", x=arrays()["x"], label=np.arange(N) % 3)
    split = load_data(str(tmp_path / "a.npz"))
    assert split.train.num_classes == 3 and split.heldout.labels.bincount().tolist() == [10, 10, 10]


def test_labels_of_a_larger_set_are_said_and_may_be_numbered_anew(tmp_path):
    np.savez(tmp_path / "a.npz", x=arrays()["x"], label=np.arange(N) % 2 * 150)
    with pytest.warns(Notice, match=r"read 300 rows of x \(8×2\); 151 classes, 149 of them without a row"):
        assert load_data(tmp_path / "a.npz").train.num_classes == 151
    with pytest.warns(Notice, match="; 2 classes"):
        anew = load_data(tmp_path / "a.npz", reading=Reading(renumber_labels=True))
    assert anew.train.num_classes == 2 and set(anew.train.labels.tolist()) == {0, 1}
    assert load_data(tmp_path / "a.npz", reading=Reading(num_classes=200)).train.num_classes == 200
    np.savez(tmp_path / "b.npz", x=arrays()["x"], label=np.arange(N) * 2)
    with pytest.raises(UsageError, match="labels from 0 to 598 on 300 rows; .*--num-classes 599"):
        load_data(tmp_path / "b.npz")


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path):
    good = arrays()
    bad = good["x"].copy()
    bad[7, 0, 0] = np.nan
    for name, changed, sentence in [
        ("short", {"obs": good["obs"][:5]}, "obs is 5×3, x has 300 rows"),
        ("nan", {"x": bad}, "x has numbers that are not finite, in row 7"),
        ("flat", {"x": good["x"][:, 0, 0]}, r"x is \(300,\); give \(N, D\) vectors"),
        ("few", {name: rows[:50] for name, rows in good.items()}, "holds 50 rows of x; 100 or more"),
        ("same", {"x": np.zeros_like(good["x"])}, "all numbers of x are the same"),
        ("text", {"obs": np.array(["a"] * N)}, "obs is of type <U1; give numbers"),
        ("label", {"label": np.full(N, -1)}, "labels from -1 to -1 on 300 rows; labels count from 0"),
        ("half", {"label": np.full(N, 0.5)}, "label must be whole numbers from 0"),
        ("group", {"group": np.zeros(N)}, "all rows are of one group"),
    ]:
        np.savez(tmp_path / f"{name}.npz", **{**good, **changed})
        with pytest.raises(UsageError, match=sentence):
            load_data(str(tmp_path / f"{name}.npz"))
    np.savez(tmp_path / "wide.npz", x=50 * good["x"])
    with pytest.warns(Notice, match=r"x has standard deviation \d+"):
        load_data(str(tmp_path / "wide.npz"))
    with pytest.raises(UsageError, match="image_size is 8, but .* holds vectors"):
        load_data(str(tmp_path / "wide.npz"), 8)


def test_a_network_of_trajectories_hears_its_conditions_and_may_be_told_none():
    config = MLPConfig(dim=16, width=16, depth=1, embedding_dim=8, conditions=("goal", "obs"), cond_dim=7)
    network, generator = MLP(config), torch.Generator().manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    z, logsnr = torch.randn(5, *SHAPE, generator=generator), torch.zeros(5)
    cond = {"obs": torch.ones(5, 3), "goal": torch.ones(5, 2, 2)}
    out = network(z, logsnr, cond)
    assert out.shape == z.shape
    for name in cond:
        assert not torch.allclose(out, network(z, logsnr, {**cond, name: 2 * cond[name]}))
    with pytest.raises(UsageError, match="must be given obs in cond"):
        network(z, logsnr, {"goal": cond["goal"]})


def test_a_policy_is_trained_distilled_and_saved(file, tmp_path):
    data = load_data(str(file))
    short = TrainConfig(num_steps=2, batch_size=8)
    config = replace(momatch.recipe("vectors-teacher"), train=short, monitor=MonitorConfig(every=0))
    run = teacher_training(data, config)
    for _ in run:
        pass
    teacher = run.finish()
    assert teacher.cond_shapes == {"goal": (2, 2), "obs": (3,)} and teacher.sample_shape == SHAPE
    config = replace(momatch.recipe("vectors-2"), train=short, monitor=MonitorConfig(every=0))
    config = replace(config, guidance=GuidanceConfig(scale=0.5))  # away from conditions that are 0
    student = momatch.distill(teacher, data, config)
    student.save(tmp_path / "student")
    cond = {"obs": torch.ones(5, 3), "goal": torch.ones(5, 2, 2)}
    samples = student.sample(5, cond=cond)
    assert samples.shape == (5, *SHAPE)
    assert torch.equal(samples, momatch.load_student(tmp_path / "student").sample(5, cond=cond))
    with pytest.raises(UsageError, match="the data .* come without obs.*add an array"):
        np.savez(tmp_path / "no.npz", x=arrays()["x"], goal=arrays()["goal"])
        momatch.distill(teacher, load_data(str(tmp_path / "no.npz")), config)


@pytest.mark.slow
def test_every_command_knows_vectors(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("obs.npy", np.ones((2, 3), "float32"))
    np.save("goal.npy", np.ones((2, 2), "float32"))
    asked = ["--cond", "obs=obs.npy", "--cond", "goal=goal.npy"]
    for command in [
        ["train-teacher", "vectors-teacher", "--data", str(file), "--out", "t", *QUICK,
         "--monitor.every", "2"],
        ["distill", "vectors-2", "--teacher", "t", "--data", str(file), "--out", "s", *QUICK,
         "--monitor.every", "2"],
        ["sample", "s", "--num", "5", *asked],
        ["sample", "s", "--num", "5", *asked, "--out", "a.npz"],
        ["sample", "s", "--num", "5", *asked, "--out", "a.safetensors"],
        ["sample", "s", "--num", "5", *asked, "--out", "a.png"],
        ["evaluate", "s", "--num", "100", "--teacher-steps", "2"],
        ["report", "s"],
        ["plan", "vectors-2", "--teacher", "t", "--data", str(file), *QUICK],
    ]:  # fmt: skip
        assert cli.main(command) == 0, (command, capsys.readouterr())
    student = momatch.load_student("s")
    cond = {"obs": torch.ones(5, 3), "goal": torch.ones(5, 2, 2)}
    assert student.cond_shapes == {"goal": (2, 2), "obs": (3,)}
    assert np.array_equal(np.load("samples.npy"), student.sample(5, cond=cond).numpy())
    assert set(np.load("a.npz").files) == {"x", "obs", "goal"}
    text = (tmp_path / "s" / "report.html").read_text()
    assert "sliced W2, x and condition" in text and text.count("data:image/png") >= 2
    rows = json.loads((tmp_path / "s" / "evaluation.json").read_text())["rows"]
    metrics = {m["metric"] for m in rows[0]["result"]["measurements"]}
    assert {"sliced_wasserstein", "energy_distance", "conditional_energy_distance"} <= metrics
    for command, sentence in [
        (["sample", "s", "--cond", "what=obs.npy"], "this model takes goal, obs"),
        (["sample", "s", "--cond", "obs=none.npy"], "none.npy cannot be read"),
        (["sample", "s", "--num", "2", "--cond", "obs=goal.npy"], "this model takes"),
        (["train-teacher", "digits-teacher", "--data", str(file), "--out", "u"], "use the recipe vectors"),
        (["train-teacher", "vectors-teacher", "--data", "digits", "--out", "u"], "a recipe for pictures"),
        (["export", "s", "e"], "use --format onnx"),
        (["sample", "digits", "--num", "1", "--out", "a.npy"], "since this model makes pictures"),
    ]:
        assert cli.main(command) == 2, command
        assert sentence in capsys.readouterr().err


def test_the_numbers_tell_right_samples_from_wrong_ones():
    generator = torch.Generator().manual_seed(0)

    def pairs(n, wrong=False):
        c = torch.randint(2, (n, 1), generator=generator).float()
        mean = (1 - c if wrong else c) * 4 - 2
        x = torch.cat([mean + 0.5 * torch.randn(n, 1, generator=generator), torch.zeros(n, 1)], 1)
        return x, c  # the second number never varies

    def rows(n, name):
        x, c = pairs(n)
        return ImageSet(x, torch.zeros(n).long(), 1, name, conditions={"c": c}, space="vectors")

    data = Split(rows(500, "train"), rows(500, "held-out"))

    def found(x, c):
        return {m.metric: m.value for m in vectors.measure(x, {"c": c}, data, 0)}

    right, wrong = found(*pairs(500)), found(*pairs(500, wrong=True))
    narrow = found(pairs(500)[0] * 0.3, pairs(500)[1])
    assert right["sliced_wasserstein"] < 0.15 and wrong["sliced_wasserstein"] < 0.15
    assert right["conditional_sliced_wasserstein"] < 0.15 < 0.5 < wrong["conditional_sliced_wasserstein"]
    assert right["conditional_energy_distance"] < 0.02 < 0.2 < wrong["conditional_energy_distance"]
    assert right["sliced_wasserstein_floor"] < 0.15 < narrow["sliced_wasserstein"]
    assert abs(right["energy_distance"]) < 0.02 < 0.1 < narrow["energy_distance"]
    # ±2 the wrong way round, in units of √(4 + 0.25); of two columns one is right
    assert wrong["conditional_mean_error"] == pytest.approx(4 / 4.25**0.5 / 2**0.5, rel=0.05)
    assert right["conditional_mean_error"] < 0.05 and right["conditional_std_error"] < 0.05


@pytest.mark.slow
def test_a_student_of_trajectories_goes_out_as_onnx(file, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = str(tmp_path / "onnx")
    for command in [
        ["train-teacher", "vectors-teacher", "--data", str(file), "--out", str(tmp_path / "t"), *QUICK],
        ["distill", "vectors-2", "--teacher", str(tmp_path / "t"), "--data", str(file),
         "--out", str(tmp_path / "s"), *QUICK],
        ["export", str(tmp_path / "s"), out, "--format", "onnx"],
    ]:  # fmt: skip
        assert cli.main(command) == 0, (command, capsys.readouterr())
    student = momatch.load_student(tmp_path / "s")
    z, cond = torch.randn(3, *SHAPE), {"goal": torch.randn(3, 2, 2), "obs": torch.randn(3, 3)}
    sampler = json.loads((tmp_path / "onnx" / "sampler.json").read_text())
    logsnr = torch.full((3,), sampler["logsnr"][1])
    session = onnxruntime.InferenceSession(out + "/model.onnx")
    inputs = {"z": z, "logsnr": logsnr, "time": torch.full((3,), sampler["time"][1]), **cond}
    known = {node.name for node in session.get_inputs()}
    (x,) = session.run(None, {k: v.numpy() for k, v in inputs.items() if k in known})
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(x), student.denoiser(z, logsnr, cond), rtol=1e-4, atol=1e-5
        )
