"""How many samples the network gets at a time: never what is sampled, and by default what memory holds."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import momatch
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser, Guided
from momatch.diffusion.sampling import ancestral
from momatch.models.model import CHUNK, Model
from momatch.networks.configs import MLPConfig
from momatch.utils import memory
from momatch.utils.errors import UsageError
from tiny_models import UVIT, make_teacher

N = CHUNK + 44


class Pointwise(nn.Module):
    """Row by row and number by number, so exact whatever the batch; keeps the sizes it was called with.

    A call makes a tensor `factor` times as large as z, from one like z; it has a weight that `parameters()`
    does not show, of `hidden` numbers.
    """

    def __init__(self, factor: int = 1, hidden: int = 1):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.factor, self.hidden, self.sizes = factor, [torch.ones(hidden)], []

    def forward(self, z, logsnr, cond=None):
        self.sizes.append(len(z))
        shift = 0 if cond is None else cond["label"].view(-1, *(1,) * (z.ndim - 1))
        large = (z.tanh() * self.scale * self.hidden[0][0] + shift).repeat(1, self.factor, 1, 1)
        return large[:, : z.shape[1]]


def make(network: nn.Module, shape: tuple[int, ...], **more) -> Model:
    return Model(Denoiser(network, "x", {"label": 3}), MLPConfig(2), schedules.cosine(), shape, 3, 3, **more)


def labels(n: int) -> dict[str, torch.Tensor]:
    return {"label": torch.arange(n) % 3}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 7, 100, 256, None])
def test_samples_are_what_the_seed_says_for_any_batch_size(batch_size, eta):
    """The seed's meaning, written out: of each 256 samples a generator, its first noise for 256 always."""
    network = Pointwise()
    model = make(network, (1, 3, 5))
    found = model.sample(N, cond=labels(N), seed=7, eta=eta, batch_size=batch_size)
    assert max(network.sizes) == (batch_size or CHUNK)
    expected = []
    for chunk, count in enumerate((CHUNK, N - CHUNK)):
        rng = torch.Generator().manual_seed(7 * 1_000_003 + chunk)
        noise = torch.randn(CHUNK, 1, 3, 5, generator=rng)[:count]
        cond = {"label": labels(N)["label"][chunk * CHUNK :][:count]}
        expected.append(ancestral(model.denoiser, noise, 3, model.schedule, cond, rng, eta).detach())
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("model", [make_teacher(), make_teacher(UVIT)], ids=["U-Net", "U-ViT"])
def test_networks_agree_to_rounding(model):
    whole = model.sample(20, 3, labels(20), seed=1)
    for size in (1, 3, 19):
        parts = model.sample(20, 3, labels(20), seed=1, batch_size=size)
        assert (parts - whole).abs().max() < 1e-6 * max(1, float(whole.abs().max()))


@pytest.mark.parametrize(("room_for", "asked"), [(0, 1), (1, 1), (5, 5), (39, 39), (300, 40)])
def test_large_samples_are_batched_by_free_memory(monkeypatch, room_for, asked):
    """A call needs 13 times z, weights aside; half of what is free may go, less three z of all 40 samples."""
    network, shape = Pointwise(factor=12, hidden=10**7), (3, 80, 80)
    one = 3 * 80 * 80 * 4
    free = 2 * (3 * 40 * one + 13 * one * (room_for + 0.5)) if room_for else 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    model = make(network, shape)
    model.sample(40, cond=labels(40))
    assert network.sizes[:2] == [1, 1] and max(network.sizes) == asked


def test_guidance_counts_for_the_memory_of_a_sample(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 80**2 * 3 * 4 * (3 * 40 + 13 * 20.5))
    plain, twice = Pointwise(factor=12), Pointwise(factor=12)
    model = make(plain, (3, 80, 80))
    model.sample(40, cond=labels(40))
    replace(model, denoiser=Guided(make(twice, (3, 80, 80)).denoiser, 1.0)).sample(40, cond=labels(40))
    # what guidance itself makes comes on top: z twice, the estimate
    assert max(plain.sizes) == 20 and 12 <= max(twice.sizes) <= 18


def test_small_samples_and_single_ones_are_not_measured(monkeypatch):
    def unasked(device):
        raise AssertionError("nobody need know")

    monkeypatch.setattr(memory, "free_bytes", unasked)
    for shape, n in (((3, 64, 64), 5), ((3, 80, 80), 1)):
        network = Pointwise()
        make(network, shape).sample(n, cond=labels(n))
        assert network.sizes == [n] * 3


def test_free_memory_is_what_the_system_says(monkeypatch, tmp_path):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    total = memory.free_bytes(cpu)
    assert total == memory.os.sysconf("SC_PHYS_PAGES") * memory.os.sysconf("SC_PAGE_SIZE") // 2
    memory.MEMINFO.write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:    3000 kB\n")
    assert memory.free_bytes(cpu) == 3000 * 1024
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 600)
    assert memory.free_bytes(gpu) == 1100


@pytest.mark.parametrize("batch_size", [0, -3, CHUNK + 1])
def test_a_batch_size_out_of_range_is_refused(batch_size):
    model = momatch.load_teacher("digits")
    with pytest.raises(UsageError, match=rf"must lie in 1 … {CHUNK}, got {batch_size}"):
        model.sample(4, batch_size=batch_size)
