"""The loop, checkpoints and seeds: resuming is exact, damage is survived, no weight becomes non-finite."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.schedules import cosine
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch, Method, Update
from momatch.methods.transition import Transition
from momatch.networks.configs import MLPConfig
from momatch.networks.registry import build
from momatch.training import checkpoint, distributed
from momatch.training.batches import Prefetched, image_batches
from momatch.training.checkpoint import CheckpointError
from momatch.training.loop import NonFiniteLossError, state_of, train
from momatch.training.optim import Optimizer, learning_rate_schedule
from momatch.utils.errors import Notice
from momatch.utils.files import DamagedFileError, read_tensors, write_tensors
from momatch.utils.seeding import derive_seed, generator

DATA = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=3)


def denoiser(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    network = build(MLPConfig(dim=2, width=16, depth=1, embedding_dim=8))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Denoiser(network)


def matching() -> Alternating:
    return Alternating(denoiser(0), denoiser(1), denoiser(2), Transition(cosine(), steps=4))


def run(
    method, steps: int, directory: Path | None, stop_after: int | None = None, batches=None
) -> dict[str, Tensor]:
    config = TrainConfig(num_steps=steps, batch_size=16, log_every=1, checkpoint_every=5)
    records = train(method, batches or image_batches(DATA, None, 16, seed=7), config, OPTIM, directory)
    for record in records:
        if record.step == stop_after:
            records.close()
    return {f"{r}.{k}": v.clone() for r, net in method.trainable.items() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("stop_after", [1, 5, 8])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, stop_after):
    """Stops after odd and even steps: the parity of the update lives in the step, not in a counter."""
    whole = run(matching(), 12, None)
    run(matching(), 12, tmp_path, stop_after)
    assert [p.name for p in checkpoint.paths(tmp_path)][-1] == f"step-{stop_after:08d}.safetensors"
    resumed = run(matching(), 12, tmp_path)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


KILLED = """
import sys, pathlib
sys.path.insert(0, {tests!r})
import test_training as t
class Slow:
    def __init__(self, batches): self.batches = batches
    def __call__(self, step):
        if step == 13: print("ready", flush=True); import time; time.sleep(60)
        return self.batches(step)
t.run(t.matching(), 20, pathlib.Path({folder!r}), batches=Slow(t.image_batches(t.DATA, None, 16, seed=7)))
"""


def test_a_run_killed_without_warning_resumes_bit_for_bit(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.paths(tmp_path / "run")[-1].name == "step-00000010.safetensors"
    whole, resumed = run(matching(), 20, None), run(matching(), 20, tmp_path / "run")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_at_most_two_checkpoints_are_kept_and_no_temporary_file(tmp_path):
    run(matching(), 20, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000015.safetensors",
        "step-00000020.safetensors",
    ]


@pytest.mark.parametrize("damage", ["truncated", "empty", "a flipped byte", "another step"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_taken(tmp_path, damage):
    run(matching(), 12, tmp_path, stop_after=10)
    before, newest = checkpoint.paths(tmp_path)
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1  # the last bit of a weight
    stepped = newest.read_bytes().replace(b'step\\": 10', b'step\\": 30')
    assert len(stepped) == len(content) and stepped != newest.read_bytes()
    whole = {"truncated": content[: len(content) // 2], "empty": b"", "a flipped byte": content}
    newest.write_bytes({**whole, "another step": stepped}[damage])
    with pytest.warns(Notice, match=f"{newest} is damaged.*going on from {before.name}, the last good one"):
        resumed = run(matching(), 12, tmp_path)
    unbroken = run(matching(), 12, None)
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


def test_without_a_good_checkpoint_nothing_is_begun_anew(tmp_path):
    run(matching(), 12, tmp_path, stop_after=10)
    for path in checkpoint.paths(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-00000010.*step-00000005.*to start again"):
        run(matching(), 12, tmp_path)


def test_a_checkpoint_of_an_earlier_version_has_no_fingerprint_and_is_read(tmp_path):
    run(matching(), 12, tmp_path, stop_after=10)
    newest = checkpoint.paths(tmp_path)[-1]
    with safe_open(newest, framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "fingerprint"}
    save_file(load_file(newest), newest, metadata)
    unbroken, resumed = run(matching(), 12, None), run(matching(), 12, tmp_path)
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


def test_as_many_checkpoints_stay_as_asked_for(tmp_path):
    config = TrainConfig(num_steps=8, batch_size=16, checkpoint_every=1, keep=3)
    for _ in train(matching(), image_batches(DATA, None, 16, seed=7), config, OPTIM, tmp_path):
        pass
    assert [path.name[5:13] for path in checkpoint.paths(tmp_path)] == ["00000006", "00000007", "00000008"]


def test_a_longer_run_warms_up_anew_and_its_past_stays():
    config = OptimConfig(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate_schedule(config, n, 60, (20,)) for n in range(60)]
    assert rates[:20] == [learning_rate_schedule(config, n, 20) for n in range(20)]
    assert rates[20:] == [learning_rate_schedule(config, n, 40) for n in range(40)]


@pytest.mark.parametrize("damage", ["foreign", "other networks"])
def test_a_checkpoint_that_cannot_be_used_is_named_and_nothing_is_changed(tmp_path, damage):
    run(matching(), 12, tmp_path, stop_after=10)
    newest = checkpoint.paths(tmp_path)[-1]
    if damage == "foreign":
        save_file({"a": torch.zeros(2)}, newest)
    method = matching()
    if damage == "other networks":
        other = Denoiser(build(MLPConfig(dim=2, width=24, depth=1, embedding_dim=8)))
        method = Alternating(denoiser(0), other, denoiser(2), Transition(cosine(), steps=4))
    before = {k: v.clone() for k, v in method.student.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        run(method, 12, tmp_path)
    assert str(newest) in str(error.value) and "delete it to go on from the one before" in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in method.student.state_dict().items())
    newest.unlink()
    if damage != "other networks":
        whole, resumed = run(matching(), 12, None), run(matching(), 12, tmp_path)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run(matching(), 10, tmp_path, stop_after=5)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(matching(), 10, tmp_path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005.safetensors"]
    whole, resumed = run(matching(), 10, None), run(matching(), 10, tmp_path)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


class Explodes(Method):
    """The loss of step 7 is infinite or not a number."""

    def __init__(self, value: float):
        self.network, self.value = nn.Linear(2, 1), value

    @property
    def trainable(self):
        return {"student": self.network}

    def step(self, step: int, batch: Batch) -> Update:
        loss = self.network(batch.x).square().mean() * (self.value if step == 7 else 1.0)
        return Update({"student": loss}, dict)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_the_run_before_any_weight_changes(tmp_path, value):
    torch.manual_seed(0)
    method, sound = Explodes(value), Explodes(1.0)
    sound.network.load_state_dict(method.network.state_dict())
    before_it = run(sound, 20, None, stop_after=7)
    config = TrainConfig(num_steps=20, batch_size=16, log_every=1, checkpoint_every=5)
    with pytest.raises(NonFiniteLossError) as error:
        for _ in train(method, image_batches(DATA, None, 16, seed=7), config, OPTIM, tmp_path):
            pass
    assert "step 7" in str(error.value) and "step-00000005.safetensors" in str(error.value)
    assert all(torch.equal(before_it[f"student.{k}"], v) for k, v in method.network.state_dict().items())


def test_each_role_has_its_own_optimizer():
    """Training the student must not move the auxiliary, momentum included."""
    method = matching()
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=1, beta1=0.9)
    config = TrainConfig(num_steps=6, batch_size=16)
    states = []
    for _ in train(method, image_batches(DATA, None, 16, seed=7), config, optim):
        states.append({r: [p.clone() for p in n.parameters()] for r, n in method.trainable.items()})

    def moved(role: str, i: int) -> bool:
        return any(not torch.equal(a, b) for a, b in zip(states[i][role], states[i - 1][role], strict=True))

    assert [(moved("student", i), moved("auxiliary", i)) for i in range(1, 6)] == [
        (True, False),
        (False, True),
        (True, False),
        (False, True),
        (True, False),
    ]


def test_adam_is_the_paper_s():
    """One step from zero state: Δ = −lr · g/(|g| + ε), by hand, with β₁ = 0."""
    network = nn.Linear(3, 1, bias=False)
    before = network.weight.detach().clone()
    optimizer = Optimizer(network, OptimConfig(learning_rate=0.1))
    group = optimizer.adam.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.0, 0.99), 1e-12)
    assert network.weight.grad is not None
    network.weight.grad.copy_(torch.tensor([[0.5, -1e-4, 2.0]]))
    optimizer.set_learning_rate(0.1)
    optimizer.step()
    torch.testing.assert_close(network.weight.detach() - before, torch.tensor([[-0.1, 0.1, -0.1]]))


def test_one_buffer_trains_like_one_tensor_per_parameter():
    """Against torch's Adam, with channels-last convolutions: forward, clip and five steps agree."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(2, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3)).double()
    ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    config = OptimConfig(learning_rate=1e-2, beta1=0.5, clip_norm=0.05)
    optimizer = Optimizer(ours, config)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.5, 0.99), eps=1e-12)
    assert ours[0].weight.is_contiguous(memory_format=torch.channels_last)
    for i in range(5):
        x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(i)).double()
        optimizer.zero_grad()
        ours(x).square().sum().backward()
        norm = optimizer.clip()
        optimizer.set_learning_rate(1e-2)
        optimizer.step()
        adam.zero_grad()
        theirs(x).square().sum().backward()
        assert (
            norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.05))) and norm > 0.05
        )
        adam.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # torch clips to max_norm less a millionth


def test_the_learning_rate_rises_then_falls_to_zero():
    config = OptimConfig(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate_schedule(config, n, 110) for n in range(110)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.5) and rates[109] == pytest.approx(0.01)


def test_gradients_are_clipped_to_the_global_norm():
    network = nn.ParameterList([torch.zeros(3), torch.zeros(4)])
    optimizer = Optimizer(network, OptimConfig(clip_norm=1.0))
    for parameter, value in zip(network, (3.0, 4.0), strict=True):
        parameter.grad.fill_(value)
    norm = (3 * 9.0 + 4 * 16.0) ** 0.5
    assert optimizer.clip() == pytest.approx(norm)
    clipped = torch.cat([p.grad for p in network])
    assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-5)
    assert float(clipped[-1] / clipped[0]) == pytest.approx(4 / 3)
    assert optimizer.clip() == pytest.approx(1.0, rel=1e-5)


def test_seeds_differ_by_seed_purpose_and_step_and_repeat():
    seeds = {
        derive_seed(seed, name, step)
        for seed in range(5)
        for name in ("train", "sample")
        for step in range(100)
    }
    assert len(seeds) == 1000
    first, again = (torch.rand(5, generator=generator(3, "train", 4)) for _ in range(2))
    assert torch.equal(first, again)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    arguments = ["-m", "momatch", "distill", "digits-8", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [
            sys.executable,
            *arguments,
            "--train.batch-size",
            "4",
            "--monitor.every",
            "0",
            "--train.num-steps",
            "100000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "run the same command again to go on" in out.replace("\n", " ") and "Traceback" not in err
    assert len(checkpoint.paths(tmp_path / "run" / "checkpoints")) >= 1


@pytest.mark.parametrize("stop_after", [None, 5])
def test_prefetched_batches_give_the_same_losses_and_checkpoints(tmp_path, stop_after):
    """Also after a stop in the middle; the thread is gone when the loop is."""
    found = []
    for prefetch in (False, True):
        folder, losses = tmp_path / str(prefetch), []
        config = TrainConfig(num_steps=12, batch_size=16, log_every=1, checkpoint_every=4)
        while len(losses) < 12:
            method, batches = matching(), image_batches(DATA, None, 16, seed=7)
            for record in train(method, batches, config, OptimConfig(), folder, prefetch=prefetch):
                losses.append({k: v for k, v in record.metrics.items()})
                if record.step == stop_after:
                    break
        found.append((losses, load_file(folder / "step-00000012.safetensors")))
    (losses, weights), (with_losses, with_weights) = found
    assert losses == with_losses and weights.keys() == with_weights.keys()
    assert all(torch.equal(weights[name], with_weights[name]) for name in weights)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_in_the_thread_that_reads_is_raised_by_the_step_that_needs_the_batch():
    inner = image_batches(DATA, None, 16, seed=7)

    def batches(step: int) -> Batch:
        if step == 3:
            raise OSError("the shard is gone")
        return inner(step)

    steps = []
    with pytest.raises(OSError, match="the shard is gone"):
        for record in train(matching(), batches, TrainConfig(num_steps=9), OptimConfig(), prefetch=True):
            steps.append(record.step)
    assert steps == [1, 2, 3]


def test_data_that_do_not_come_are_told_of_and_waited_for(monkeypatch):
    """In every process, which the usual notices are not: all others hang on the one whose disk is gone."""
    inner, answers = image_batches(DATA, None, 16, seed=7), threading.Event()

    def batches(step: int) -> Batch:
        if step == 2:
            answers.wait(30)
        return inner(step)

    monkeypatch.setattr(distributed, "size", lambda: 8)
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    prefetched = Prefetched(batches, 9, patience=0.05)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore", Notice)
        for step in range(4):
            if step == 2:
                threading.Timer(0.2, answers.set).start()
            assert torch.equal(prefetched(step).x, inner(step).x)
    prefetched.close()
    sentences = [str(each.message) for each in told]
    assert len(sentences) >= 2 and all("process 3: step 3 has waited for its data" in s for s in sentences)


def test_whoever_gives_up_on_data_that_do_not_come_is_let_go(monkeypatch):
    answers = threading.Event()
    prefetched = Prefetched(lambda step: answers.wait(30), 9, patience=0.05)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(warnings, "warn", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prefetched(0)
    begun = time.monotonic()
    prefetched.close()
    assert time.monotonic() - begun < 10
    answers.set()


def test_a_checkpoint_is_written_only_when_its_record_has_been_taken(tmp_path):
    """Whoever keeps the log has then written the row: no checkpoint covers a step that the log lacks."""
    config = TrainConfig(num_steps=4, batch_size=16, checkpoint_every=2)
    records = train(matching(), image_batches(DATA, None, 16, seed=7), config, OptimConfig(), tmp_path)
    there = [[path.stem for path in tmp_path.iterdir()] for _ in records]
    assert there[1] == [] and there[2] == ["step-00000002"]
    assert checkpoint.newest_step(tmp_path) == 4


def test_a_method_may_set_the_optimizer_of_a_role(tmp_path):
    method = matching()
    kind = type("Other", (type(method),), {"optimizer_overrides": {"auxiliary": {"beta1": 0.5}}})
    method.__class__ = kind
    optimizers = state_of(method, OptimConfig()).optimizers
    assert (optimizers["auxiliary"].config.beta1, optimizers["student"].config.beta1) == (0.5, 0.0)
    assert optimizers["auxiliary"].adam.param_groups[0]["betas"] == (0.5, 0.99)


def test_a_batch_knows_its_rows_and_so_do_its_halves():
    batch = image_batches(DATA, None, 16, seed=7)(3)
    assert torch.equal(DATA[batch.rows], batch.x)
    for half in batch.halves():
        assert len(half.rows) == 8 and torch.equal(DATA[half.rows], half.x)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9, 0.999])
def test_a_flipped_bit_in_any_file_of_weights_is_noticed(place, tmp_path):
    """The middle of a file is float32 numbers: what a flipped bit leaves there is a number as well."""
    tensors = {"a": torch.randn(300), "b": torch.arange(700)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, about="it")
    found, metadata = read_tensors(path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors) and metadata["about"] == "it"
    contents = bytearray(path.read_bytes())
    contents[int(place * len(contents))] ^= 1
    path.write_bytes(contents)
    with pytest.raises(DamagedFileError, match=f"{path} is damaged .its contents are not what was written"):
        read_tensors(path)
    save_file(tensors, path)  # somebody else's file, or one of before: taken as it is
    assert torch.equal(read_tensors(path)[0]["b"], tensors["b"])
