"""Algorithm 3 against closed forms, and against Algorithm 2."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from momatch.config.schema import GuidanceConfig
from momatch.data.emoji import MASK, TOKENS
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser, Guided
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch
from momatch.methods.instant import Instant, adam_preconditioner
from momatch.methods.jvp import choose_product, difference_product, forward_product
from momatch.methods.transition import Transition
from momatch.networks.configs import MLPConfig, UNetConfig, UViTConfig
from momatch.networks.registry import build
from momatch.utils.errors import UsageError

SCHEDULE = schedules.cosine()


class Linear(nn.Module):
    """a·z + b."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a).double()), nn.Parameter(torch.tensor(b).double())

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        return self.a * z + self.b


def randomised(module: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """Weights away from their (zero) starting values, so that every branch of a network matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(scale * noise / max(1.0, math.sqrt(parameter[0].numel()) if parameter.ndim else 1))
    return module


def unet(seed: int, dtype=torch.float64) -> Denoiser:
    config = UNetConfig(channels=(8, 16), attention_levels=(1,), num_classes=3, embedding_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(config)
    return Denoiser(randomised(network, seed).to(dtype), "v", {"label": 3})


def images(n: int, seed: int, dtype=torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return Batch(torch.randn(n, 1, 8, 8, generator=generator).to(dtype), {"label": labels}, generator)


def weight(logsnr: Tensor, x_tilde: Tensor, x_teacher: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-logsnr)) + 0.3


@pytest.mark.parametrize("product", [forward_product, difference_product])
def test_the_gradient_is_algorithm_2_s_after_an_infinitesimal_step_of_the_auxiliary(product):
    teacher, student, transition = unet(0), unet(1), Transition(SCHEDULE, 4)
    generator = torch.Generator().manual_seed(9)
    scale = {
        k: torch.rand(v.shape, generator=generator).double() + 0.5 for k, v in teacher.named_parameters()
    }

    instant = Instant(teacher, student, transition, scale, weight, product)
    instant.step(0, images(16, 5)).losses["student"].backward()
    found = torch.cat([p.grad.flatten() for p in student.parameters()])

    student = copy.deepcopy(student)
    auxiliary = copy.deepcopy(teacher).requires_grad_(True)
    alternating = Alternating(teacher, student, auxiliary, transition, weight)
    a, b = images(16, 5).halves()
    alternating.step(0, a).losses["auxiliary"].backward()
    length = 1e-5
    with torch.no_grad():
        for name, parameter in auxiliary.named_parameters():
            parameter.sub_(length * scale[name] * parameter.grad)
    student.zero_grad()
    alternating.step(1, b).losses["student"].backward()
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()]) / length
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def one_pair(t: float, s: float) -> Transition:
    """All transitions go from one t to one s."""
    return Transition(SCHEDULE, 1, lambda u: torch.full_like(u, s), lambda u: torch.full_like(u, t - s))


class LinearCase:
    """Data N(m, v), student c·z_t + d, one pair (t, s): everything is Gaussian and known."""

    def __init__(self, t: float, s: float, m: float = 0.4, v: float = 0.5):
        self.m, self.v, self.transition = m, v, one_pair(t, s)
        snr_t, snr_s = (math.exp(float(SCHEDULE(torch.tensor(time).double()))) for time in (t, s))
        self.alpha_t, self.alpha_s = (math.sqrt(snr / (1 + snr)) for snr in (snr_t, snr_s))
        self.var_t, self.var_s = 1 / (1 + snr_t), 1 / (1 + snr_s)
        # z_s = A z_t + B x̃ + noise of variance C, by conditioning the joint Gaussian of (z_s, z_t) given x.
        covariance = self.alpha_t / self.alpha_s * self.var_s
        self.A = covariance / self.var_t
        self.B = self.alpha_s - self.A * self.alpha_t
        self.C = self.var_s - covariance**2 / self.var_t

    def moments(self, c: float, d: float) -> tuple[float, float, float, float]:
        """E[x̃], E[z_s], Cov(x̃, z_s), Var(z_s) under the student."""
        mean_t, spread_t = self.alpha_t * self.m, self.alpha_t**2 * self.v + self.var_t
        slope = self.A + self.B * c
        return (
            c * mean_t + d,
            slope * mean_t + self.B * d,
            c * slope * spread_t,
            slope**2 * spread_t + self.C,
        )

    def teacher(self) -> tuple[float, float]:
        """E[x | z_s] = a z_s + b for the data."""
        a = self.alpha_s * self.v / (self.alpha_s**2 * self.v + self.var_s)
        return a, self.m - a * self.alpha_s * self.m

    def batch(self, n: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        x = self.m + math.sqrt(self.v) * torch.randn(n, 1, generator=generator, dtype=torch.float64)
        return Batch(x, None, generator)


def test_the_logged_loss_is_unbiased_for_half_the_squared_mean_gradient():
    case, (c, d), (a, b) = LinearCase(0.7, 0.4), (0.6, 0.1), (0.5, -0.2)
    scale = {"a": torch.tensor(0.7).double(), "b": torch.tensor(1.9).double()}
    mean_x, mean_z, covariance, variance = case.moments(c, d)
    # G = −2 E[(x̃ − a z_s − b) (z_s, 1)]
    g_b = -2 * (mean_x - a * mean_z - b)
    g_a = -2 * (covariance - a * variance) + g_b * mean_z
    wanted = 0.5 * (float(scale["a"]) * g_a**2 + float(scale["b"]) * g_b**2)

    method = Instant(Linear(a, b), Linear(c, d), case.transition, scale)
    values = torch.stack(
        [method.step(0, case.batch(64, seed)).metrics()["instant_loss"] for seed in range(1500)]
    )
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - wanted) < 4 * error
    assert error < 0.1 * wanted  # or the line above says nothing
    # What one minibatch for both halves would give is far off: A and B must be independent.
    same = torch.stack([dependent_value(method, case.batch(2, seed)) for seed in range(600)])
    assert float(same.mean()) > wanted + 5 * float(same.std()) / math.sqrt(len(same))


def dependent_value(method: Instant, batch: Batch) -> Tensor:
    """½ GᵀΛG with the same minibatch twice."""
    gradient = method.teacher_gradient(method.transition.draw(method.student, batch, False), batch)
    return 0.5 * torch.stack([(method.preconditioner[k] * g**2) for k, g in gradient.items()]).sum()


@pytest.mark.parametrize("t, s", [(1.0, 0.5), (0.75, 0.5)])
@pytest.mark.parametrize("name", ["alternating", "instant"])
def test_gaussian_data_and_a_linear_student_reach_the_known_minimiser(name, t, s):
    """E[x̃ | z_s] = E[x | z_s] for c·z_t + d: two equations for c and d, solved by bisection.

    From t = 1 they say that x̃ is distributed as the data: c² = v, d = m.
    """
    case = LinearCase(t, s)
    a, b = case.teacher()

    def mismatch(c: float) -> float:
        d = case.m * (1 - c * case.alpha_t)  # E[x̃] = m
        _, _, covariance, variance = case.moments(c, d)
        return covariance / variance - a

    low, high = 0.0, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mismatch(middle) < 0 else (low, middle)
    c_wanted, d_wanted = low, case.m * (1 - low * case.alpha_t)
    if t == 1.0:
        assert abs(c_wanted - math.sqrt(case.v)) < 1e-3

    student, auxiliary = Linear(a, b), Linear(a, b)
    if name == "alternating":
        method = Alternating(Linear(a, b), student, auxiliary, case.transition)
    else:
        ones = {"a": torch.ones(()).double(), "b": torch.ones(()).double()}
        method = Instant(Linear(a, b), student, case.transition, ones)
    optimizers = {k: torch.optim.Adam(v.parameters(), lr=0.03) for k, v in method.trainable.items()}
    last: list[Tensor] = []
    for step in range(600):
        for role, loss in method.step(step, case.batch(2048, step)).losses.items():
            optimizers[role].zero_grad()
            loss.backward()
            optimizers[role].step()
        if step == 200:
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = 0.003
        if step >= 350:
            last.append(torch.stack([student.a.detach(), student.b.detach()]))
    c, d = torch.stack(last).mean(0).tolist()
    assert abs(c - c_wanted) < 0.01 and abs(d - d_wanted) < 0.01
    assert abs(c - a) > 0.03  # the starting point, the posterior mean, is not the answer


def mlp() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(MLPConfig(dim=2, width=16, depth=2, num_classes=3, embedding_dim=16))
    return Denoiser(randomised(network, 1), "eps", {"label": 3}), torch.randn(4, 2)


def vit(channels: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(UViTConfig(1, channels, 1, 32, 2, 2, num_classes=3, embedding_dim=16))
    return Denoiser(randomised(network, 1), "v", {"label": 3}), images(4, 0, torch.float32).x


def text() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(UViTConfig(1, (8,), 1, 32, 2, 2, embedding_dim=16, text_dim=5))
    null = {TOKENS: torch.zeros(3, 5), MASK: torch.tensor([1, 0, 0])}
    return Guided(Denoiser(randomised(network, 1), "v", null), 0.7), images(4, 0, torch.float32).x


class Diffusers(nn.Module):
    """diffusers' own U-Net, attention included, on our terms."""

    def __init__(self):
        from diffusers import UNet2DModel

        super().__init__()
        self.model = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            layers_per_block=1,
            num_class_embeds=4,
        )

    def forward(self, z, logsnr, cond=None):
        return self.model(z, torch.sigmoid(-logsnr) * 999, class_labels=cond["label"]).sample


def diffusers_unet() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Diffusers()
    return Denoiser(randomised(network, 1), "eps", {"label": 3}), images(4, 0, torch.float32).x


def clipped() -> tuple[nn.Module, Tensor]:
    guidance = GuidanceConfig(scale=0.7, clip="static")
    return guidance.apply(unet(0, torch.float32)), images(4, 0, torch.float32).x


def unguarded(denoiser: Denoiser) -> Denoiser:
    return GuidanceConfig(scale=0.7).apply(unet(0, torch.float32))


FAMILIES = {
    "uvit": lambda: vit((8,)),
    "dit": lambda: vit(()),
    "diffusers": diffusers_unet,
    "unet": lambda: (unet(0, torch.float32), images(4, 0, torch.float32).x),
    "guided": lambda: (Guided(unet(0, torch.float32), 0.7), images(4, 0, torch.float32).x),
    "clipped": clipped,
    "text": text,
    "mlp": mlp,
}
LABELS = {"label": torch.tensor([0, 1, 2, 3])}
CAPTIONS = {
    TOKENS: torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(4)),
    MASK: torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]),
}


def direction_of(module: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: p.detach().abs() * torch.randn(p.shape, generator=generator) for k, p in module.named_parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_both_products_agree_with_a_difference_in_float64(family):
    denoiser, z = FAMILIES[family]()
    logsnr, cond = torch.tensor([-3.0, -1.0, 0.5, 4.0]), CAPTIONS if family == "text" else LABELS
    direction = direction_of(denoiser, 3)
    x_forward, forward = forward_product(denoiser, direction, z, logsnr, cond)
    x_difference, difference = difference_product(denoiser, direction, z, logsnr, cond)
    with torch.no_grad():
        plain = denoiser(z, logsnr, cond)
    torch.testing.assert_close(x_forward, plain, rtol=1e-4, atol=1e-5)
    assert float((x_difference - plain).norm() / plain.norm()) < 1e-3
    assert float((forward - difference).norm() / forward.norm()) < 1e-3
    if denoiser.clip is not None:  # it holds the output alone: the change is that of what is not clipped
        assert 0.05 < float((plain.abs() == denoiser.clip).float().mean()) < 0.95
        denoiser = unguarded(denoiser)

    exact = copy.deepcopy(denoiser).double()
    h, shifted = 1e-6, []
    cond = {k: v.double() if v.is_floating_point() else v for k, v in cond.items()}
    for sign in (1, -1):
        moved = copy.deepcopy(exact)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.add_(sign * h * direction[name].double())
            shifted.append(moved(z.double(), logsnr.double(), cond))
    wanted = (shifted[0] - shifted[1]) / (2 * h)
    assert float(wanted.norm()) > 0.01
    assert float((forward - wanted).norm() / wanted.norm()) < 1e-4


def test_forward_mode_leaves_the_network_as_it_was():
    denoiser, z = FAMILIES["unet"]()
    hooks = sum(len(m._forward_pre_hooks) for m in denoiser.modules())
    choose_product("forward", denoiser, z, torch.zeros(4), None)
    assert sum(len(m._forward_pre_hooks) for m in denoiser.modules()) == hooks
    assert torch.backends.cuda.flash_sdp_enabled()


class Old(torch.autograd.Function):
    """A custom function without a forward-mode rule, as extensions have them."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))

    def forward(self, z, logsnr, cond=None):
        return Old.apply(self.a * z)


def test_auto_falls_back_to_differences_where_forward_mode_fails_and_forward_says_so():
    z, logsnr = torch.randn(3, 2), torch.zeros(3)
    assert choose_product("auto", Stubborn(), z, logsnr, None) == ("difference", difference_product)
    assert choose_product("auto", Linear(1.0, 0.0), z.double(), logsnr, None)[0] == "forward"
    with pytest.raises(UsageError, match="method.product=difference"):
        choose_product("forward", Stubborn(), z, logsnr, None)


def test_a_small_second_moment_does_not_get_a_giant_step():
    moments = {"a": torch.tensor([1e-6, 1e-22]), "b": torch.tensor([1e-6])}
    scale = adam_preconditioner(moments, eps=0.1)
    assert float(scale["a"][1] / scale["b"][0]) < 20
    with pytest.raises(ValueError, match="not all zero"):
        adam_preconditioner({"a": torch.zeros(3)}, 0.1)


def test_centring_removes_the_gradient_that_real_data_give():
    """Biased teacher, student that copies the data: uncentred it is told to move, centred it is not."""
    case = LinearCase(1.0, 0.5)
    student = Linear(math.sqrt(case.v), case.m)  # from t = 1 these are the data's moments
    ones = {"a": torch.ones(()).double(), "b": torch.ones(()).double()}
    a, b = case.teacher()
    found = {}
    for centre in (False, True):
        method = Instant(Linear(a, b + 0.3), student, case.transition, ones, centre=centre)
        found[centre] = torch.stack(
            [method.step(0, case.batch(4096, n)).metrics()["instant_loss"] for n in range(100)]
        )
    mean, error = float(found[True].mean()), float(found[True].std()) / 10
    assert abs(mean) < 4 * error
    assert float(found[False].mean()) > 100 * error
