"""When something goes wrong in one of several processes, all end, saying one sentence; nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from several import commands, ended, in_processes

import momatch
from momatch.cli import main as command_line
from momatch.config.schema import DistillConfig
from momatch.training import distributed
from momatch.utils.errors import ConfigError, RunError, UsageError

TRAIN = "--train.batch-size 8 --train.log-every 1 --train.checkpoint-every 1000 --monitor.every 0".split()


def distill(folder: Path, steps: int) -> list[str]:
    return ["distill", "digits-8", "--out", str(folder / "run"), "--train.num-steps", str(steps), *TRAIN]


def said(folder: Path, count: int) -> list[str]:
    """What all processes printed, line by line."""
    return "".join((folder / f"{rank}.txt").read_text() for rank in range(count)).splitlines()


def steps_of(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["step"] for row in rows if "gap" in row]


def wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(steps_of(folder)) < count:
        assert time.monotonic() < deadline, said(folder, 2)
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_to_one_stops_all_at_the_same_step_and_the_command_goes_on(tmp_path):
    children = commands(2, tmp_path, distill(tmp_path, 1000))
    wait_for_steps(tmp_path, 3)
    os.kill(children[1], signal.SIGTERM)
    assert ended(children) == [75, 75]
    (sentence,) = [line for line in said(tmp_path, 2) if "stopped" in line]
    (last,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"stopped at step {steps_of(tmp_path)[-1]} of 1000 and saved" in sentence
    assert last.name == f"step-{steps_of(tmp_path)[-1]:08d}.safetensors"
    children = commands(2, tmp_path, distill(tmp_path, 1000))
    before = len(steps_of(tmp_path))
    wait_for_steps(tmp_path, before + 2)
    for child in children:
        os.kill(child, signal.SIGINT)
    assert ended(children) == [130, 130]
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_with_one_sentence_that_names_it(tmp_path, victim):
    children = commands(2, tmp_path, distill(tmp_path, 1000))
    wait_for_steps(tmp_path, 3)
    os.kill(children[victim], signal.SIGKILL)
    codes = ended(children)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    (sentence,) = [line for line in said(tmp_path, 2) if line.startswith("momatch: ")]
    assert f"process {victim} of 2 is gone" in sentence and "the same command again" in sentence


@pytest.mark.slow
def test_wrong_usage_is_said_once(tmp_path):
    children = commands(2, tmp_path, [*distill(tmp_path, 4), "--train.batch-size", "7"])
    assert ended(children) == [2, 2]
    (line,) = said(tmp_path, 2)
    assert "train.batch_size is 7, of all 2 processes together; make it a multiple of 2" in line
    assert not (tmp_path / "run").exists()


def test_commands_of_one_process_say_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line(["recipes"]) == 2
    assert "momatch recipes runs in one process; call it without torchrun" in capsys.readouterr().err


def test_what_processes_tell_each_other(tmp_path):
    """Averages, standard deviations, flags, answers and errors of the main process; different data."""

    def talk() -> dict:
        from momatch.methods.base import Deviation

        rank = distributed.rank()
        tensors = [
            torch.full((2, 3), float(rank)),
            torch.full((4,), rank + 1.0)[::2],
            torch.eye(3) * rank,
        ]
        distributed.average(tensors)
        values = torch.arange(10.0).view(2, 5)[rank]
        found = {
            "averages": tensors,
            "numbers": distributed.numbers_of({"mean": values.mean(), "std": Deviation(values)}),
            "any": [distributed.any_of(rank == 1), distributed.any_of(False)],
            "answer": distributed.on_main(lambda: ["from", rank]),
            "tensors": distributed.tensors_on_main(lambda: {"a": torch.arange(3) * 2, "no": torch.empty(0)}),
            "errors": [],
        }
        for error in (UsageError("use 2"), OSError(28, "disk full")):
            try:
                distributed.on_main(lambda error=error: raise_(error))
            except (UsageError, RunError, OSError) as caught:
                found["errors"].append(str(caught))
        try:
            distributed.check_same("the data", str(rank))
        except RunError as caught:
            found["errors"].append(str(caught))
        distributed.check_same("the data", "same")
        try:
            distributed.check_source(DistillConfig(source="rollout"))
        except ConfigError as caught:
            found["errors"].append(str(caught))
        return found

    for found in in_processes(2, tmp_path, talk):
        assert [t.tolist() for t in found["averages"]] == [
            [[0.5] * 3] * 2,
            [1.5, 1.5],
            (torch.eye(3) / 2).tolist(),
        ]
        assert found["numbers"] == pytest.approx({"mean": 4.5, "std": float(torch.arange(10.0).std())})
        assert found["any"] == [True, False] and found["answer"] == ["from", 0]
        assert found["tensors"]["a"].tolist() == [0, 2, 4] and found["tensors"]["no"].shape == (0,)
        assert found["errors"][:2] == ["use 2", "[Errno 28] disk full"]
        assert "process 1 has not the same as process 0 in the data" in found["errors"][2]
        assert "set train.noise_slices to 2" in found["errors"][3]


def raise_(error: Exception) -> None:
    raise error


def test_sampling_is_shared_and_samples_are_those_of_one_process(tmp_path):
    student = momatch.load_teacher("digits")
    labels = {"label": torch.arange(37) % 10}
    alone = student.sample(37, 3, labels, seed=5)
    calls = []

    def draw() -> dict:
        model = distributed.split(student)
        student.denoiser.register_forward_hook(lambda module, args, out: calls.append(len(out)))
        return {"samples": model.sample(37, 3, labels, seed=5), "calls": calls}

    for found in in_processes(3, tmp_path, draw):
        torch.testing.assert_close(found["samples"], alone, rtol=0, atol=1e-5)
        assert found["calls"] == [13, 13, 13]


@pytest.mark.slow
def test_evaluation_on_two_processes_gives_the_numbers_of_one(tmp_path):
    arguments = ["evaluate", "digits", "--steps", "2", "--num", "300"]
    for count in (1, 2):
        folder = tmp_path / str(count)
        assert set(ended(commands(count, folder, arguments))) == {0}
    one, two = (next(row for row in said(tmp_path / str(n), n) if "[" in row).split() for n in (1, 2))
    assert one[:-1] == two[:-1]  # all but samples a second
