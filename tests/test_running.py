"""How the networks of sample, evaluate, guidance and serve run."""

from __future__ import annotations

import pytest
import torch

from momatch.cli import main
from momatch.cli.running import Running
from momatch.diffusion.denoiser import Guided
from momatch.utils.errors import UsageError
from tiny_models import make_teacher


def test_by_itself_nothing_is_changed():
    model = make_teacher()
    prepared = Running().prepare(model)
    assert prepared.denoiser.precision == "float32" and torch.equal(prepared.sample(2, 2), model.sample(2, 2))


def test_precision_is_the_samples_and_the_models_own_stays():
    model = make_teacher()
    low = Running(device="cpu", precision="bfloat16").prepare(model)
    plain, rounded = model.sample(3, 2), low.sample(3, 2)
    assert model.denoiser.precision == "float32"
    assert 0 < float((plain - rounded).abs().max()) < 0.2


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(UsageError, match="CUDA graphs; on cpu use none"):
        Running(device="cpu", compile="graph").prepare(make_teacher())


@pytest.mark.parametrize("command", [["sample"], ["evaluate", "--num", "100"], ["guidance", "--num", "100"]])
def test_every_command_takes_it(command, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(Running, "prepare", lambda self, model: seen.append(self) or model)
    monkeypatch.chdir(tmp_path)
    name, *more = command
    arguments = [name, "digits", "--steps", "1", "--precision", "bfloat16", "--batch-size", "7", *more]
    assert main([*arguments, "--device", "cpu"]) == 0, capsys.readouterr().err
    assert seen == [Running(7, "cpu", "bfloat16")]


@pytest.mark.slow
def test_compiled_networks_sample_the_same():
    model = make_teacher()
    found = model.sample(3, 2)
    compiled = Running(device="cpu", compile="default").prepare(model)
    torch.testing.assert_close(compiled.sample(3, 2), found, rtol=1e-4, atol=1e-5)
    guided = Guided(compiled.denoiser, 1.0)
    assert guided.unwrapped.network is model.denoiser.network
