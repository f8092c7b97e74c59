"""Runs on prepared data: a text-conditional latent teacher, distilled, looked at, measured and sampled."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import N
from PIL import Image
from safetensors.torch import load_file, save_file

from momatch import cli, load_data, load_student, load_teacher
from momatch.cli.serve.comparison import Choice
from momatch.config import InstantConfig
from momatch.config.schema import DistillConfig, GuidanceConfig, MonitorConfig, StoppingConfig, TrainConfig
from momatch.data.images import ImageSet, Split
from momatch.data.prepared import load_prepared
from momatch.diffusion import conventions, schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.evaluation.conditions import fixed_cond
from momatch.evaluation.evaluate import evaluate_at
from momatch.interop.autoencoder import decoder_of
from momatch.models.model import Model
from momatch.networks.configs import DiffusersConfig
from momatch.networks.diffusers import DiffusersNetwork
from momatch.training.build import distillation
from momatch.training.plan import plan
from momatch.utils.errors import UsageError

BETAS = torch.linspace(1e-4, 0.02, 100).tolist()


def teacher(pipeline=None, channels=4, width=16, nulls=None, num_classes=0, **info):
    """A conditional U-Net with random weights, as one would be loaded from a pipeline."""
    from tiny_pipelines import conditional_unet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = conditional_unet(
            in_channels=channels,
            out_channels=channels,
            cross_attention_dim=width,
            **({"num_class_embeds": num_classes + 1} if num_classes else {}),
        )
        config = DiffusersConfig("UNet2DConditionModel", json.loads(unet.to_json_string()))
        network = DiffusersNetwork(config)
    return Model(
        Denoiser(network, "eps", nulls, conventions.timesteps(BETAS)),
        config,
        schedules.cosine(),
        (channels, 8, 8),
        4,
        num_classes,
        {"role": "teacher", **({"pipeline": str(pipeline)} if pipeline else {}), **info},
        cond_shapes={"encoder_hidden_states": (-1, width)},
    )


@pytest.fixture
def few_resamples(monkeypatch):
    from momatch.evaluation import evaluate

    monkeypatch.setattr(evaluate, "Judge", partial(evaluate.Judge, resamples=5))


def config(**more):
    train = TrainConfig(num_steps=4, batch_size=4, log_every=1, checkpoint_every=4)
    fields = {"steps": 2, "train": train, "monitor": MonitorConfig(every=2, num_samples=100), **more}
    return DistillConfig(**fields)


@pytest.fixture
def data(prepared):
    return load_data(str(prepared("stable_diffusion")))


@pytest.fixture(scope="module")
def run(prepared, pipelines, tmp_path_factory):
    """A run on prepared latents by the command line; its teacher has no null condition of its own."""
    root = tmp_path_factory.mktemp("run")
    teacher(pipelines("stable_diffusion")).save(root / "teacher")
    code = cli.main(
        ["distill", "digits-2", "--teacher", f"{root / 'teacher'}", "--out", f"{root / 'run'}",
         "--data", str(prepared("stable_diffusion")), "--train.num-steps", "4", "--train.batch-size", "4",
         "--guidance.scale", "1.5", "--monitor.every", "2", "--monitor.num-samples", "100"]
    )  # fmt: skip
    assert code == 0
    return root / "run"


def test_batches_carry_what_the_model_is_asked_with(data):
    batch = distillation(teacher(), data, config()).batches(0)
    assert set(batch.cond) == {"encoder_hidden_states"} and batch.x.shape == (4, 4, 8, 8)
    at = (data.train.images[:][:, None] == batch.x[None]).flatten(2).all(2).nonzero()
    rows = at[at[:, 1].argsort(), 0]
    assert torch.equal(
        batch.cond["encoder_hidden_states"], data.train.conditions["encoder_hidden_states"][rows]
    )
    both = distillation(teacher(num_classes=2), data, config()).batches(0)
    assert torch.equal(both.x, batch.x) and torch.equal(both.cond["label"], data.train.labels[rows])


def test_guidance_leads_away_from_the_datas_null_condition_unless_the_teacher_has_its_own(data):
    null = data.train.null_condition["encoder_hidden_states"]
    guided = config(guidance=GuidanceConfig(scale=2.0))
    method = distillation(teacher(), data, guided).method
    cond = {"encoder_hidden_states": data.train.conditions["encoder_hidden_states"][:3]}
    assert torch.equal(method.teacher.null_values["encoder_hidden_states"], null)
    z, logsnr = torch.randn(3, 4, 8, 8), torch.zeros(3)
    with torch.no_grad():
        plain = teacher().denoiser.eval()
        asked = plain(z, logsnr, cond)
        unasked = plain(z, logsnr, {"encoder_hidden_states": null.expand(3, 7, 16)})
        torch.testing.assert_close(method.teacher(z, logsnr, cond), 3 * asked - 2 * unasked)
    own = {"encoder_hidden_states": torch.full((7, 16), 0.5)}
    kept = distillation(teacher(nulls=own), data, guided).method.teacher
    assert torch.equal(kept.null_values["encoder_hidden_states"], own["encoder_hidden_states"])


def test_the_run_looks_at_decoded_pictures_and_leaves_a_student_that_knows_the_empty_prompt(run, prepared):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looks = [line for line in lines if line.get("event") == "look"]
    assert [look["features"] for look in looks] == ["decoded pixels averaged to 8×8"] * 2
    with Image.open(run / looks[0]["grid"]) as grid:
        assert grid.mode == "RGB" and grid.width > 10 * 16
    student = load_student(run)
    nulls = load_file(prepared("stable_diffusion") / "null-condition.safetensors")
    null = student.denoiser.null_values["encoder_hidden_states"]
    assert torch.equal(null, nulls["encoder_hidden_states"]) and student.sample(3).shape == (3, 4, 8, 8)
    shown = Choice("run", student).teacher().denoiser  # beside the student, it is asked for nothing as then
    assert torch.equal(shown.null_values["encoder_hidden_states"].cpu(), null)


def test_looks_ask_for_the_first_prompts_of_the_set_they_are_compared_with(data, monkeypatch):
    from momatch.training import monitor as monitoring

    asked = []
    model = teacher()
    original = Model.sample

    def sample(self, n, steps=None, cond=None, seed=0, eta=1.0):
        asked.append(cond["encoder_hidden_states"][:])
        return original(self, n, steps, cond, seed, eta)

    monkeypatch.setattr(monitoring.Model, "sample", sample)
    stopping = config(stopping=StoppingConfig(patience=5, held_back=0.2))
    run = distillation(model, data, stopping)
    list(run)
    held_back = run.reference.conditions["encoder_hidden_states"]
    assert len(held_back) < 100
    want = torch.cat([held_back[:]] * 10)[:100]
    assert len(asked) == 2 and all(torch.equal(each, want) for each in asked)


def test_evaluation_asks_for_held_out_prompts_and_reads_them_chunk_by_chunk(data):
    asked = fixed_cond(teacher(), data.heldout, 25)["encoder_hidden_states"]
    assert not isinstance(asked, torch.Tensor), "rows of the shards, not a copy of them"
    real = data.heldout.conditions["encoder_hidden_states"]
    assert torch.equal(asked[9:13], torch.cat([real[:]] * 3)[9:13])
    with_classes = fixed_cond(teacher(num_classes=2), data.heldout, 25)
    assert torch.equal(with_classes["label"], data.heldout.labels.repeat(3)[:25])


def test_what_metrics_are_computed_on_is_in_their_names(data, pipelines, monkeypatch):
    asked, original = [], Model.sample_chunks

    def sample_chunks(self, n, steps=None, cond=None, seed=0, eta=1.0, **others):
        asked.append(cond["encoder_hidden_states"][:4])
        return original(self, n, steps, cond, seed, eta, **others)

    monkeypatch.setattr(Model, "sample_chunks", sample_chunks)
    decoded = evaluate_at(teacher(pipelines("stable_diffusion")), "teacher", data, 1, 120, resamples=10)
    names = {m.features for m in decoded.result.measurements}
    assert names == {"decoded pixels averaged to 8×8", "latents"}
    neighbours = [m for m in decoded.result.measurements if m.metric.startswith("neighbour")]
    assert {m.features for m in neighbours} == {"latents"} and "latent L2" in neighbours[0].note
    assert torch.equal(asked[0], data.heldout.conditions["encoder_hidden_states"][:4])
    plain = evaluate_at(teacher(), "teacher", data, 1, 120, resamples=10)
    assert {m.features for m in plain.result.measurements} == {"latents"}


def test_decoded_metrics_are_those_of_the_decoded_pictures(data, pipelines):
    from momatch.evaluation.frechet import frechet_distance
    from momatch.evaluation.statistics import FeatureStatistics

    model = teacher(pipelines("stable_diffusion"))
    row = evaluate_at(model, "teacher", data, 1, 100, resamples=10)
    found = row.result.get("frechet", "decoded pixels averaged to 8×8")
    samples = model.sample(100, 1, fixed_cond(model, data.heldout, 100), 10_000)
    decode = decoder_of(model)

    def statistics(latents):
        pictures = decode(latents)
        averaged = torch.nn.functional.avg_pool2d(pictures, 2).flatten(1)
        return FeatureStatistics.from_features(averaged)

    want = frechet_distance(statistics(samples), statistics(data.heldout.images[:]))
    assert found.value == pytest.approx(want, rel=1e-3)


def test_large_sets_are_compared_by_a_sample_that_is_counted(data, pipelines, monkeypatch):
    monkeypatch.setattr("momatch.evaluation.evaluate.MOST_DECODED", 6)
    monkeypatch.setattr("momatch.training.monitor.MOST_DECODED", 30)
    model = teacher(pipelines("stable_diffusion"))
    row = evaluate_at(model, "teacher", data, 1, 100, resamples=10)
    frechet = row.result.get("frechet", "decoded pixels averaged to 8×8")
    assert frechet.n_reference == 6 and len(data.heldout) > 6
    looks = [event.look for event in distillation(model, data, config()) if event.look]
    assert looks[0].reference == f"{data.train.name}, 30 of {len(data.train)}"


def test_samples_of_a_latent_model_are_decoded(run, pipelines, tmp_path, capsys):
    png, npz = tmp_path / "grid.png", tmp_path / "made.npz"
    for out in (png, npz):
        assert cli.main(["sample", str(run), "--num", "4", "--out", str(out)]) == 0
    with Image.open(png) as grid:
        assert grid.mode == "RGB" and grid.width > 2 * 16
    student = load_student(run)
    assert student.info["pipeline"] == str(pipelines("stable_diffusion"))
    pictures = decoder_of(student)(student.sample(4))
    want = pictures.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(npz)["images"], want) and want.shape == (4, 16, 16, 3)


def test_without_its_pipeline_a_latent_model_shows_its_first_channels(run, data, tmp_path):
    student = load_student(run)
    model = dataclasses.replace(
        student, provenance={**student.info, "pipeline": str(tmp_path / "moved away")}
    )
    model.save(tmp_path / "student")
    assert decoder_of(model) is None
    png, npz = tmp_path / "grid.png", tmp_path / "made.npz"
    for out in (png, npz):
        assert cli.main(["sample", str(tmp_path / "student"), "--num", "4", "--out", str(out)]) == 0
    with Image.open(png) as grid:
        assert grid.mode == "RGB"
    assert np.load(npz)["latents"].shape == (4, 4, 8, 8)
    bare = dataclasses.replace(data.train, origin={})
    looks = [e.look for e in distillation(teacher(), Split(bare, data.heldout), config(), tmp_path / "run")]
    assert [look.grid for look in looks if look] == [f"samples/step-{i:08d}-latents.png" for i in (2, 4)]


def test_the_command_evaluates_a_text_conditional_run_and_its_teacher(run, few_resamples, capsys):
    code = cli.main(["evaluate", str(run), "--num", "100", "--teacher-steps", "2"])
    assert code == 0, capsys.readouterr().err
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "student"]
    assert {p.name for p in (run / "samples").glob("final-*")} == {
        "final-teacher-2.png",
        "final-student-2.png",
    }


def test_a_guidance_sweep_takes_the_datas_null_condition(run, prepared, few_resamples, tmp_path):
    source = ["guidance", str(run.parent / "teacher"), "--data", str(prepared("stable_diffusion"))]
    out = tmp_path / "curve.png"
    assert cli.main([*source, "--scales", "0,2", "--steps", "1", "--num", "100", "--out", str(out)]) == 0
    first, second = json.loads(out.with_suffix(".json").read_text())
    assert first["result"] != second["result"]


def test_mapped_rows_are_not_counted_as_held(data):
    mapped = plan(config(), teacher(), data, probe_seconds=0.01)
    assert mapped.data == 0
    held = dataclasses.replace(
        data.train,
        images=data.train.images[:],
        conditions={k: rows[:] for k, rows in data.train.conditions.items()},
    )
    assert plan(config(), teacher(), Split(held, held), 0.01).data == len(held) * 4 * (4 * 8 * 8 + 7 * 16)


def test_a_run_on_mapped_rows_is_the_run_on_the_same_rows_in_memory(data):
    held = dataclasses.replace(
        data.train,
        images=data.train.images[:],
        conditions={k: rows[:] for k, rows in data.train.conditions.items()},
    )
    instant = InstantConfig(lambda_steps=2, product="difference")
    for options in ({}, {"method": instant}):
        settings, runs = config(monitor=MonitorConfig(every=0), **options), []
        for train in (data.train, held):
            events = distillation(teacher(), Split(train, data.heldout), settings)
            runs.append([event.record.metrics for event in events])
        assert runs[0] == runs[1] and runs[0][-1]


def unfit(kind, data, pipelines):
    train = data.train
    if kind == "channels":
        return teacher(channels=3), data, "latents of shape .4, 8, 8., the model makes .3, 8, 8."
    if kind == "width":
        return (
            teacher(width=20),
            data,
            "of 7×16 numbers a sample, the model takes any×20",
        )
    if kind == "no condition":
        bare = dataclasses.replace(train, conditions={})
        return teacher(), Split(bare, bare), "come without encoder_hidden_states, .*momatch prepare PICTURES"
    if kind == "classes":
        return teacher(num_classes=1), data, "have 2 classes, the model knows 1"
    if kind == "other pipeline":
        other = pipelines("stable_diffusion", seed=9)
        return teacher(other), data, f"whose encoders differ; run momatch prepare with --teacher {other}"
    if kind == "no null":
        bare = dataclasses.replace(train, null_condition={})
        return teacher(), Split(bare, bare), "no null condition to guide away from in encoder_hidden_states"
    own = {"encoder_hidden_states": torch.zeros(9, 16)}
    return teacher(nulls=own), data, r"null condition has encoder_hidden_states of shape \(9, 16\)"


@pytest.mark.parametrize(
    "kind",
    ["channels", "width", "no condition", "classes", "other pipeline", "no null", "null of another shape"],
)
def test_what_does_not_fit_is_refused_in_one_sentence(kind, data, pipelines):
    model, split, says = unfit(kind, data, pipelines)
    with pytest.raises(UsageError, match=says) as error:
        distillation(model, split, config(guidance=GuidanceConfig(scale=1.0)))
    assert "\n" not in str(error.value)


def test_a_teacher_trained_on_latents_decodes_its_looks(pipelines, captioned, tmp_path, capsys):
    """momatch's own network on prepared latents, with labels; the prompts are left aside."""
    from momatch.interop.prepare import PrepareConfig, prepare

    options = PrepareConfig(str(pipelines("stable_diffusion")), captions="ignore", shard_size=50)
    for _ in prepare(str(captioned), options, tmp_path / "latents"):
        pass
    assert load_prepared(tmp_path / "latents").captions is None
    code = cli.main(
        ["train-teacher", "digits-teacher", "--data", str(tmp_path / "latents"),
         "--out", str(tmp_path / "run"),
         "--train.num-steps", "2", "--train.batch-size", "4", "--monitor.every", "2",
         "--monitor.num-samples", "100", "--image-size", "16"]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    model = load_teacher(tmp_path / "run")
    assert model.sample_shape == (4, 8, 8) and model.num_classes == 2
    assert decoder_of(model)(model.sample(2, 1)).shape == (2, 3, 16, 16)
    again = ["train-teacher", "digits-teacher", "--data", str(tmp_path / "latents"), "--image-size", "8"]
    assert cli.main([*again, "--out", str(tmp_path / "other")]) == 2
    assert "was prepared at 16; use 16 or 0" in capsys.readouterr().err


def test_rollouts_look_at_no_picture_only_at_labels():
    """Distillation without data: pictures made by the teacher, or any others of that shape, give one run."""
    digits = load_data("digits").train
    settings = dataclasses.replace(config(source="rollout"), monitor=MonitorConfig(every=0))

    def losses(images, labels):
        train = ImageSet(images, labels, 10, "any")
        events = list(distillation(load_teacher("digits"), Split(train, train), settings))
        return [event.record.metrics for event in events]

    first = losses(digits.images, digits.labels)
    assert losses(torch.zeros_like(digits.images), digits.labels) == first
    assert losses(digits.images, digits.labels.flip(0)) != first


def test_a_run_without_data_end_to_end(tmp_path, capsys):
    made, out = tmp_path / "made.npz", tmp_path / "run"
    assert cli.main(["sample", "digits", "--num", "200", "--steps", "2", "--out", str(made)]) == 0
    code = cli.main(
        ["distill", "digits-8", "--data", str(made), "--source", "rollout", "--out", str(out),
         "--train.num-steps", "2", "--train.batch-size", "4", "--monitor.every", "0"]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert load_student(out).num_classes == 10


def test_prepared_data_may_move_but_not_change(prepared, tmp_path):
    source, moved = prepared("stable_diffusion"), tmp_path / "data"
    shutil.copytree(source, moved)
    before = load_data(str(source)).train.fingerprint()
    assert load_data(str(moved)).train.fingerprint() == before
    shard = moved / "shard-00000.safetensors"
    tensors = load_file(shard)
    save_file({**tensors, "latents": tensors["latents"] + 1}, shard)
    assert load_data(str(moved)).train.fingerprint() != before and len(load_prepared(moved)) == N
