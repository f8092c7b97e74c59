"""Tokens from end to end: data, teacher, student, samples, evaluation, report; and what is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import momatch
from momatch.cli import main
from momatch.config.recipes import recipe
from momatch.config.schema import DistillConfig, MonitorConfig, OptimConfig, TeacherConfig, TrainConfig
from momatch.data.image_io import DataError
from momatch.data.images import Split
from momatch.data.reading import Reading
from momatch.data.sources import load_data
from momatch.data.tokens import Tokens, decode, with_mask
from momatch.diffusion.categorical import CategoricalProcess
from momatch.evaluation.tokens import (
    BigramFeatures,
    integers,
    measure,
    ngram_divergence,
    row_entropy,
    words_of,
)
from momatch.interop.load import load_any
from momatch.methods.discrete import DiscreteConfig, DiscreteMatching
from momatch.models.model import ModelError, load_model
from momatch.networks.configs import TokenTransformerConfig
from momatch.training.build import distillation, teacher_training
from momatch.utils.errors import ConfigError, UsageError

LENGTH = 8
WORDS = ["the", "sea", "is", "wide", "and", "Über", "deep", "we", "sail", "on"]
TINY = TokenTransformerConfig(width=16, depth=1, embedding_dim=16)
READ = Reading(row_length=LENGTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text of 4,000 characters and more."""
    path = tmp_path_factory.mktemp("tokens")
    rng = random.Random(0)
    (path / "sea.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(1000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(folder) -> Split:
    return load_data(folder / "sea.txt", 0, READ)


def teacher_config(folder: Path, **changes) -> TeacherConfig:
    base = recipe("text-teacher")
    assert isinstance(base, TeacherConfig)
    settings = dict(
        data=str(folder / "sea.txt"),
        reading=READ,
        network=TINY,
        sampling_steps=4,
        train=TrainConfig(num_steps=6, batch_size=16, log_every=2, checkpoint_every=2),
        monitor=MonitorConfig(every=6, num_samples=100),
        device="cpu",
    )
    return replace(base, **{**settings, **changes})


def student_config(folder: Path, **changes) -> DistillConfig:
    base = recipe("text-4")
    assert isinstance(base, DistillConfig)
    settings = dict(
        teacher=str(folder / "teacher"),
        data=str(folder / "sea.txt"),
        reading=READ,
        train=TrainConfig(num_steps=6, batch_size=16, log_every=2, checkpoint_every=2),
        monitor=MonitorConfig(every=6, num_samples=100),
        device="cpu",
    )
    return replace(base, **{**settings, **changes})


@pytest.fixture(scope="module")
def teacher(folder, data) -> momatch.Model:
    run = teacher_training(data, teacher_config(folder), folder / "teacher")
    for _ in run:
        pass
    return run.finish()


@pytest.fixture(scope="module")
def student(folder, data, teacher) -> momatch.Model:
    run = distillation(load_any(folder / "teacher"), data, student_config(folder), folder / "student")
    for _ in run:
        pass
    return run.finish()


# Data


def test_a_text_comes_back_from_its_rows_and_no_text_is_on_both_sides(folder, data):
    text = (folder / "sea.txt").read_text(encoding="utf-8")
    train, heldout = (decode(integers(part), part.vocabulary) for part in (data.train, data.heldout))
    whole = [text[i : i + LENGTH] for i in range(0, len(text) // LENGTH * LENGTH, LENGTH)]
    assert sorted(train + heldout) == sorted(whole)
    assert len(heldout) == pytest.approx(len(whole) / 10, rel=0.1)
    held = "".join(heldout)  # two stretches of the text
    cuts = range(LENGTH, len(held), LENGTH)
    assert held not in text and any(held[:cut] in text and held[cut:] in text for cut in cuts)


def test_rows_are_integers_in_memory_and_one_hot_in_a_batch(data):
    rows = data.train.images
    assert isinstance(rows, Tokens) and rows.held_bytes == 2 * LENGTH * (len(data.train) + len(data.heldout))
    some = rows[torch.tensor([3, 1])]
    assert some.shape == (2, LENGTH, len(data.train.vocabulary)) and some.dtype == torch.float32
    assert torch.equal(some.argmax(-1), integers(data.train)[[3, 1]]) and bool((some.sum(-1) == 1).all())


def test_the_mask_is_one_entry_more_and_leaves_the_fingerprint(data):
    masked = with_mask(data.train, "mask")
    assert masked.images.shape[2] == data.train.images.shape[2] + 1
    assert bool((masked.images[:][..., -1] == 0).all())
    assert with_mask(data.train, "uniform").images.shape == data.train.images.shape
    assert masked.fingerprint() == data.train.fingerprint()


def test_bytes_are_decoded_again(folder):
    read = load_data(folder / "sea.txt", 0, replace(READ, tokens="bytes"))
    texts = decode(integers(read.train), read.train.vocabulary)
    assert all(word.startswith("<0x") for word in read.train.vocabulary)
    assert texts[0] == (folder / "sea.txt").read_bytes()[:LENGTH].decode("utf-8", "replace")


def test_arrays_of_tokens_with_and_without_a_vocabulary(tmp_path):
    tokens = np.arange(200 * 4).reshape(200, 4) % 7
    np.savez(tmp_path / "plain.npz", tokens=tokens)
    np.savez(tmp_path / "named.npz", tokens=tokens, vocabulary=np.array(list("abcdefgh")))
    plain, named = (load_data(tmp_path / name) for name in ("plain.npz", "named.npz"))
    assert plain.train.images.shape == (180, 4, 7) and plain.train.vocabulary == ()
    assert named.train.images.shape == (180, 4, 8)  # the vocabulary has one that does not occur
    assert decode(integers(plain.train)[:1], ()) == ["0 1 2 3"]
    assert decode(integers(named.train)[:1], named.train.vocabulary) == ["abcd"]


@pytest.mark.parametrize(
    ("contents", "reading", "message"),
    [
        (b"", READ, "is empty; give a text"),
        (b"abc\xff" * 500, READ, r"is not UTF-8 \(byte 3\).*--tokens bytes"),
        (b"ab" * 100, READ, "holds 25 rows of 8 tokens; 100 or more are needed.*--row-length"),
        (b"a" * 5000, READ, "one character, 'a'"),
        (b"\xef\xbb\xbf", READ, "no character; there is nothing to learn"),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 3000))).encode(), READ, "3,000 different characters"),
    ],
)
def test_texts_that_are_refused(tmp_path, contents, reading, message):
    (tmp_path / "x.txt").write_bytes(contents)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "x.txt", 0, reading)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.zeros((200, 4))}, "float64.*give whole numbers"),
        ({"tokens": np.zeros(200, int)}, r"shape \(200,\)"),
        ({"tokens": np.full((200, 4), -1)}, "holds -1; number them from 0"),
        ({"tokens": np.full((200, 4), 20_000)}, "holds 20,000, and 16,383 is the most"),
        ({"tokens": np.full((200, 4), 5), "vocabulary": np.array(["a", "b"])}, "its vocabulary has 2"),
        ({"tokens": np.zeros((200, 4), int)}, "all of tokens are 0"),
        ({"tokens": np.ones((20, 4), int)}, "20 rows of 4 tokens"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "x.npz")


def test_a_row_length_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="row_length is 1; use 2 to 4096"):
        Reading(row_length=1)


# Model


def test_a_model_folder_alone_makes_texts(folder, student, tmp_path):
    student.save(tmp_path / "copy")
    opened = load_model(tmp_path / "copy")
    assert isinstance(opened.process, CategoricalProcess) and opened.process.kind == "mask"
    tokens = opened.sample(5, seed=3)
    assert tokens.shape == (5, LENGTH) and tokens.dtype == torch.int64
    assert torch.equal(tokens, student.sample(5, seed=3))
    texts = opened.texts(tokens)
    assert [len(text) for text in texts] == [LENGTH] * 5
    assert int(tokens.max()) < len(opened.provenance.vocabulary)  # never the mask


def test_samples_do_not_depend_on_the_batch_size(teacher, student):
    for model in (teacher, student):
        whole = model.sample(12, 4, seed=5)
        assert torch.equal(whole, model.sample(12, 4, seed=5, batch_size=5))
        assert not torch.equal(whole, model.sample(12, 4, seed=6))


def test_a_folder_whose_process_does_not_fit_its_network_is_refused(student, tmp_path):
    student.save(tmp_path / "x")
    path = tmp_path / "x" / "model.json"
    described = json.loads(path.read_text())
    for process in (None, "gaussian"):
        path.write_text(json.dumps({**described, "process": process}))
        with pytest.raises(ModelError):
            load_model(tmp_path / "x")


def test_a_gaussian_model_says_nothing_of_its_process(tmp_path):
    digits = momatch.load_teacher("digits")
    digits.save(tmp_path / "digits")
    assert "process" not in json.loads((tmp_path / "digits" / "model.json").read_text())
    assert not load_model(tmp_path / "digits").of_tokens


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (dict(n=2, steps=65), "steps must be 1 to 64 for a student, got 65"),
        (dict(n=2, eta=0.0), "eta is 0.0, but tokens are sampled in one way alone"),
        (dict(n=2, cond={"label": torch.zeros(2)}), "unconditional"),
    ],
)
def test_requests_that_are_refused(student, request_, message):
    with pytest.raises(UsageError, match=message):
        student.sample(**request_)


# Training


def test_the_student_begins_as_its_teacher_and_is_given_noise(data, teacher, folder):
    run = distillation(teacher, data, student_config(folder))
    assert isinstance(run.method, DiscreteMatching)
    z = run.method.transition.process.prior(torch.zeros(3, LENGTH, len(data.train.vocabulary) + 1))
    logsnr = torch.zeros(3)
    noise = {"noise": torch.randn(3, LENGTH, 16)}
    with torch.no_grad():
        said = [run.method.student(z, logsnr, noise), teacher.denoiser(z, logsnr, None)]
        assert torch.equal(said[0], run.method.auxiliary(z, logsnr, None))
    assert torch.equal(*said)
    for _ in run:
        pass
    with torch.no_grad():
        one, other = (run.method.student(z, logsnr, {"noise": torch.randn(3, LENGTH, 16)}) for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(folder, data, teacher, student, kind, tmp_path):
    def begin(where):
        if kind == "teacher":
            return teacher_training(data, teacher_config(folder), where)
        return distillation(load_any(folder / "teacher"), data, student_config(folder), where)

    for event in begin(tmp_path / "run"):
        if event.record.step == 3:
            break
    run = begin(tmp_path / "run")
    for _ in run:
        pass
    assert run.finish().fingerprint() == (teacher if kind == "teacher" else student).fingerprint()


@pytest.mark.parametrize(
    "method",
    [
        DiscreteConfig(),
        DiscreteConfig("joint", target="soft", temperature=0.8, top_p=0.9, noise_dim=0),
        DiscreteConfig(loss="square"),
    ],
    ids=["alternating", "joint, soft, surer teacher", "square"],
)
@pytest.mark.parametrize("source", ["data", "rollout"])
def test_variants_train(folder, data, teacher, method, source):
    config = student_config(folder, method=method, source=source, monitor=MonitorConfig(every=0))
    run = distillation(teacher, data, config)
    before = [p.clone() for p in run.method.trainable["student"].parameters()]
    records = [event.record.metrics for event in run]
    logged = [metrics["gap"] for metrics in records if "gap" in metrics]
    assert logged and all(math.isfinite(value) for value in logged)
    after = run.method.trainable["student"].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_temperature_is_the_teachers_alone(folder, data, teacher):
    run = distillation(teacher, data, student_config(folder, method=DiscreteConfig(temperature=0.5)))
    assert isinstance(run.method, DiscreteMatching)
    temperatures = [run.method.teacher, run.method.student, run.method.auxiliary, teacher.denoiser]
    assert [d.temperature for d in temperatures] == [0.5, 1.0, 1.0, 1.0]


def test_uniform_diffusion_from_end_to_end(folder, data):
    config = teacher_config(folder, process="uniform")
    run = teacher_training(data, config)
    for _ in run:
        pass
    teacher = run.finish()
    assert teacher.network.num_tokens == len(data.train.vocabulary)
    run = distillation(teacher, data, student_config(folder))
    for _ in run:
        pass
    assert run.finish().sample(3).shape == (3, LENGTH)
    with pytest.raises(ConfigError, match="method.target is 'soft', and the teacher's process uniform"):
        distillation(teacher, data, student_config(folder, method=DiscreteConfig(target="soft")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(method="alternating"),
            "method is alternating, and the teacher makes tokens; use --method discrete",
        ),
        (dict(warm_start_steps=1), "warm_start_steps is 1, which tokens have not"),
    ],
)
def test_settings_that_tokens_have_not(folder, data, teacher, changes, message):
    with pytest.raises(ConfigError, match=message):
        distillation(teacher, data, student_config(folder, **changes))


def test_things_that_do_not_fit_each_other(folder, data, teacher, student, tmp_path):
    digits = load_data("digits")
    with pytest.raises(ConfigError, match="method is discrete, and the teacher makes no tokens"):
        distillation(momatch.load_teacher("digits"), digits, student_config(folder))
    with pytest.raises(ConfigError, match="use the recipe text-teacher"):
        teacher_training(data, TeacherConfig())
    with pytest.raises(ConfigError, match="use a recipe for pictures"):
        teacher_training(digits, teacher_config(folder))
    with pytest.raises(ConfigError, match="cut them by --row-length 8"):
        distillation(teacher, load_data(folder / "sea.txt", 0, Reading(row_length=5)), student_config(folder))
    (tmp_path / "x.txt").write_text("the quick brown fox " * 100)
    with pytest.raises(ConfigError, match="have other tokens than those that the model was trained on"):
        distillation(teacher, load_data(tmp_path / "x.txt", 0, READ), student_config(folder))
    with pytest.raises(ConfigError, match="is a student that is given noise"):
        distillation(student, data, student_config(folder))


def test_more_steps_than_a_method_is_for_are_refused():
    assert DistillConfig(method=DiscreteConfig(), steps=32).steps == 32
    with pytest.raises(ConfigError, match="steps is 32; use 1 to 16"):
        DistillConfig(steps=32)
    with pytest.raises(ConfigError, match="steps is 65; use 1 to 64"):
        DistillConfig(method=DiscreteConfig(), steps=65)


def test_a_teacher_learns_from_neighbours_within_a_few_hundred_steps(folder, data):
    """A masked letter is guessed from those beside it: "de" and "w" leave "i" alone."""
    config = teacher_config(
        folder,
        network=replace(TINY, width=32),
        train=TrainConfig(num_steps=300, batch_size=32),
        optim=OptimConfig(learning_rate=5e-3, beta1=0.9, eps=1e-8, warmup_steps=20),
        monitor=MonitorConfig(every=0),
    )
    run = teacher_training(data, config)
    for _ in run:
        pass
    words = data.train.vocabulary
    rows = torch.tensor([[words.index(letter) for letter in "is wide "]])
    z = torch.nn.functional.one_hot(rows, len(words) + 1).float()
    z[:, 4] = run.model.process.prior(z[:, 4:5])[:, 0]
    with torch.no_grad():
        guess = run.model.denoiser(z, torch.full((1,), 2.0))[0, 4]
    assert words[int(guess.argmax())] == "i" and float(guess.max()) > 0.5


# Evaluation


def test_divergence_of_ngrams_in_closed_form():
    a, b = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[2, 3, 2, 3]])
    assert ngram_divergence(a, a, 2) == 0
    assert ngram_divergence(a, b, 2) == pytest.approx(1)  # they share none
    # Pairs of a: 01, 10, 01; of c: 01, 11, 11. p = (2, 1, 0)/3, q = (1, 0, 2)/3.
    c = torch.tensor([[0, 1, 1, 1]])
    p, q = np.array([2, 1, 0]) / 3, np.array([1, 0, 2]) / 3

    def entropy(values):
        return -sum(v * math.log2(v) for v in values if v)

    expected = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    assert ngram_divergence(a, c, 2) == pytest.approx(expected)


def test_entropy_of_rows_and_words_in_closed_form():
    assert row_entropy(torch.tensor([[1, 1, 1, 1], [0, 1, 2, 3]])) == pytest.approx(1)  # 0 and 2 bits
    assert words_of(["ea is wide an", "a", "x, y z."]) == ["is", "wide", "y", "z"]


def test_measurements_see_copies_noise_and_repetition(data):
    heldout, train = integers(data.heldout), integers(data.train)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(len(data.train.vocabulary), heldout.shape, generator=generator)

    def values(rows):
        return {each.metric: each.value for each in measure(rows, data, 0)}

    copied, random_, dull = values(train[:60]), values(noise), values(torch.zeros_like(heldout))
    assert copied["copied_share"] == 1 > random_["copied_share"]
    assert random_["ngram_divergence_3"] > 0.9 > random_["ngram_divergence_floor_3"]
    assert random_["word_share"] < 0.5 < random_["word_share_reference"]
    assert dull["row_entropy"] == 0 < dull["row_entropy_reference"]
    assert random_["two_sample_accuracy"] > 0.6


def test_features_are_the_same_of_integers_and_one_hot_vectors(data):
    extract = BigramFeatures()
    rows = data.heldout.images[:][:5]
    assert torch.equal(extract(rows), extract(integers(data.heldout)[:5]))
    assert torch.equal(extract(with_mask(data.heldout, "mask").images[:][:5]), extract(rows))


# The command line


def test_every_command_from_text_to_report(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sea.txt").write_bytes((folder / "sea.txt").read_bytes())
    tiny = (
        "--train.num-steps 4 --train.batch-size 16 --monitor.every 4 --monitor.num-samples 100 --device cpu"
    )
    given = f"--data sea.txt --row-length {LENGTH} {tiny}".split()
    network = "--network.width 16 --network.depth 1 --network.embedding-dim 16 --process mask".split()
    assert main(["inspect", "sea.txt", "--row-length", str(LENGTH)]) == 0
    assert f"rows of {LENGTH} tokens" in capsys.readouterr().out
    assert main(["train-teacher", "text-teacher", "--out", "t", *given, *network]) == 0
    assert (
        f"momatch distill text-8 --teacher t --data sea.txt --row-length {LENGTH}" in capsys.readouterr().out
    )
    assert main(["plan", "text-4", "--teacher", "t", *given]) == 0
    assert main(["distill", "text-4", "--teacher", "t", "--out", "s", *given]) == 0
    assert (tmp_path / "s" / "samples" / "step-00000004.txt").read_text().startswith("--- 1\n")
    capsys.readouterr()
    assert main(["sample", "s", "--num", "2"]) == 0
    printed = capsys.readouterr().out
    assert main(["sample", "s", "--num", "2", "--out", "two.txt"]) == 0
    assert (tmp_path / "two.txt").read_text(encoding="utf-8") == printed
    assert main(["sample", "s", "--num", "2", "--out", "two.npz"]) == 0
    with np.load(tmp_path / "two.npz") as file:
        assert file["tokens"].shape == (2, LENGTH)
        assert printed == "".join(
            f"--- {i}\n{''.join(file['vocabulary'][row])}\n" for i, row in enumerate(file["tokens"], 1)
        )
    capsys.readouterr()
    assert main(["evaluate", "s", "--num", "100", "--teacher-steps", "2"]) == 0
    table = capsys.readouterr().out
    assert "JS 5" in table and "C2ST" in table and "Floor: JS" in table
    assert main(["report", "s"]) == 0
    page = (tmp_path / "s" / "report.html").read_text()
    assert "data:image/svg+xml" in page and "divergence of 2-grams" in page and "samples.txt" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{run}", "{tmp}/out"], "this student makes tokens, which neither diffusers"),
        (["export", "{run}", "{tmp}/out", "--format", "onnx"], "this student makes tokens"),
        (
            ["sample", "{run}", "--out", "{tmp}/x.png"],
            "must end in .txt, .npy or .npz, since this model makes",
        ),
        (["sample", "digits", "--out", "{tmp}/x.txt"], "this model makes no text"),
        (["sample", "{run}", "--eta", "0"], "eta is 0.0, but tokens"),
        (["evaluate", "{run}", "--sampler", "ddim"], "tokens are sampled in one way alone"),
    ],
)
def test_commands_that_are_refused(folder, student, tmp_path, capsys, arguments, message):
    words = [word.format(run=folder / "student", tmp=tmp_path) for word in arguments]
    assert main(words) == 2
    assert message in capsys.readouterr().err
