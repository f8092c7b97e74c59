"""What fits a GPU's memory: the linear model against plans of the settings themselves, and the choice."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from momatch.cli import main
from momatch.config.schema import DistillConfig, TeacherConfig, TrainConfig
from momatch.methods.alternating import AlternatingConfig
from momatch.methods.instant import InstantConfig
from momatch.networks import registry
from momatch.networks.configs import UViTConfig
from momatch.training import plan as planning
from momatch.training.activations import checkpointed
from momatch.training.fitting import RECOMPUTED, SHARE, Choice, choices, first_that_fits
from momatch.utils.errors import ConfigError
from momatch.utils.memory import Live
from momatch.utils.text import bytes_of
from tiny_models import make_teacher, random_pictures


def planner(config):
    return planning.plan(config, make_teacher(), random_pictures(), probe_seconds=0)


@pytest.mark.parametrize(
    "method", [AlternatingConfig(), AlternatingConfig("joint"), InstantConfig(lambda_steps=1)]
)
def test_memory_of_a_choice_is_what_its_own_plan_measures(method):
    config = DistillConfig(steps=2, method=method, train=TrainConfig(num_steps=10, batch_size=32))
    for choice in choices(config, planner):
        if choice.part < 4:  # so little that it is all weights
            continue
        itself = planner(choice.apply(config))
        assert choice.memory == pytest.approx(itself.memory - itself.data, rel=0.1), choice


def test_the_order_is_the_quickest_first():
    config = DistillConfig(steps=2, train=TrainConfig(batch_size=48))
    found = list(choices(config, planner, gpus=2))
    ddp = [c for c in found if c.parallel == "ddp"]
    assert [(c.part, c.checkpointing) for c in ddp] == [
        (24, False), (12, False), (24, True), (12, True), (6, True), (3, True)
    ]  # fmt: skip
    assert [c.parallel for c in found] == ["ddp"] * 6 + ["fsdp"] * 6
    assert all(c.accumulate * c.part * 2 == 48 for c in found)
    assert all(c.time == (RECOMPUTED if c.checkpointing else 1) for c in found)


def test_weights_are_cut_over_gpus_but_for_one_network():
    config = DistillConfig(steps=2, train=TrainConfig(batch_size=8))
    weights = 4 * sum(p.numel() for p in make_teacher().denoiser.parameters())
    whole, cut = (next(c for c in choices(config, planner, 4) if c.parallel == p) for p in ("ddp", "fsdp"))
    assert whole.memory - cut.memory == pytest.approx(7 * weights - 7 * weights / 4 - weights, abs=8)


def test_the_first_that_fits_is_taken_and_a_tenth_stays_free():
    found = [Choice("ddp", n, n > 2, 16 // n, memory, 1.0) for n, memory in ((1, 900), (2, 500), (4, 300))]
    assert first_that_fits(found, 1000).accumulate == 1
    assert first_that_fits(found, 999).accumulate == 2
    assert first_that_fits(found, 334).accumulate == 4
    with pytest.raises(
        ConfigError, match="does not fit 333 B: with --train.accumulate 4 --train.checkpointing"
    ):
        first_that_fits(found, 333)
    assert SHARE == 0.9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_by_shapes_are_those_of_a_step(checkpointing):
    """What the outline counts of a call, against what is alive at the peak of one, its backward included."""
    shape = UViTConfig(image_channels=3, channels=(16,), width=32, depth=6, embedding_dim=16)
    train = TrainConfig(batch_size=6, checkpointing=checkpointing)
    teacher = TeacherConfig(network=shape, image_size=16, train=train)
    outlined = planning.outline(teacher, teacher).activations
    network = registry.build(shape).train()
    with checkpointed([network]) if checkpointing else nullcontext(), Live(network.parameters()) as live:
        network(torch.zeros(6, 3, 16, 16), torch.zeros(6), None).square().mean().backward()
    assert outlined == pytest.approx(live.most, rel=0.25)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80 GB", 80e9), ("1.5m", 1.5e6), ("2tib", 2**41), ("7Ki", 7168)],
)
def test_sizes_are_read(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "80", "GiB", "-1GB", "8 GiBs", "nan GB"])
def test_other_words_are_no_sizes(text):
    with pytest.raises(ValueError, match="is no size such as 80GiB"):
        bytes_of(text)


def test_the_command_says_what_fits(capsys):
    arguments = ["plan", "imagenet64-alternating-8", "--gpus", "8", "--memory"]
    assert main([*arguments, "80GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("--train.accumulate 4:" in line and line.endswith("fits") for line in lines)
    assert sum(line.endswith("too much") for line in lines) == 2
    assert main([*arguments, "1GiB"]) == 0
    assert "this does not fit 1 GiB" in capsys.readouterr().out
    for wrong, sentence in {
        "80": "--memory '80' is no size",
        "": "--gpus 8 is for what fits them; say their --memory",
    }.items():
        assert main([*arguments, wrong]) == 2 and sentence in capsys.readouterr().err
    assert main(["plan", "digits-8", "--gpus", "0", "--memory", "1GiB"]) == 2


def test_a_run_fits_itself_to_the_memory_there_is(tmp_path, monkeypatch, capsys):
    from momatch.cli import train

    short = "--train.num-steps 2 --train.batch-size 32 --monitor.every 0 --device cpu".split()
    for name, free, how in (("all", 10**12, ""), ("part", 10 * 2**20, "--train.accumulate 2")):
        monkeypatch.setattr(train, "free_bytes", lambda device, free=free: free)
        assert main(["distill", "digits-2", *short, "--fit", "--out", str(tmp_path / name)]) == 0
        assert "A step takes about" in (said := capsys.readouterr().out) and how in said
    first, second = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("all", "part")
    )
    assert first["gap"] == pytest.approx(second["gap"], rel=1e-4)
    monkeypatch.setattr(train, "free_bytes", lambda device: 1000)
    assert main(["distill", "digits-2", *short, "--fit", "--out", str(tmp_path / "none")]) == 2
    assert "does not fit 0.977 KiB" in capsys.readouterr().err and not (tmp_path / "none").exists()
