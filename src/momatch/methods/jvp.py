"""How a denoiser's output changes when its parameters move: (∂g_θ(z)/∂θ) ν, two ways.

`forward_product` is forward-mode differentiation, exact. `difference_product` is a central difference along
ν, for networks that forward mode cannot pass: two plain calls, and an error of about 1e-4 in float32. Both
return the output beside its change. A clip (`Denoiser.clip`) holds the output, not the change. Dynamic
thresholding is another matter: its threshold stands still for the one and moves for the other. Both
compute in float32, whatever the precision of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from momatch.diffusion.denoiser import Denoiser, denoisers
from momatch.diffusion.interface import Cond
from momatch.diffusion.precision import Precision, tf32
from momatch.utils.errors import UsageError
from momatch.utils.text import first_line

ProductMode = Literal["auto", "forward", "difference"]
Product = Callable[[nn.Module, Mapping[str, Tensor], Tensor, Tensor, Cond | None], tuple[Tensor, Tensor]]
RELATIVE_STEP = 1e-3  # of a central difference, as a share of ‖θ‖


@torch.no_grad()
def forward_product(
    denoiser: nn.Module, direction: Mapping[str, Tensor], z: Tensor, logsnr: Tensor, cond: Cond | None
) -> tuple[Tensor, Tensor]:
    """(g_θ(z), (∂g_θ(z)/∂θ) ν) by forward-mode differentiation.

    Args:
        denoiser: g_θ.
        direction: ν, by parameter name; parameters left out stay fixed.
        z: (B, …) noisy data.
        logsnr: (B,).
        cond: condition or None.
    """
    parameters = {k: v.detach() for k, v in denoiser.named_parameters() if k in direction}

    def call(theta: dict[str, Tensor]) -> Tensor:
        return functional_call(denoiser, theta, (z, logsnr, cond))

    with forward_mode(denoiser), _in_float32(denoiser):
        output, change = jvp(call, (parameters,), (dict(direction),))[:2]
        return output, change


@torch.no_grad()
def difference_product(
    denoiser: nn.Module, direction: Mapping[str, Tensor], z: Tensor, logsnr: Tensor, cond: Cond | None
) -> tuple[Tensor, Tensor]:
    """The same by (g_{θ+hν} − g_{θ−hν}) / 2h with h = `RELATIVE_STEP` ‖θ‖/‖ν‖; g_θ is the mean of both."""
    clip = denoiser.clip if isinstance(denoiser, Denoiser) else None
    parameters = {k: v.detach() for k, v in denoiser.named_parameters() if k in direction}
    size = norm(direction)
    h = torch.where(size > 0, RELATIVE_STEP * norm(parameters) / size, 1.0)  # on the device: nothing waits
    with _unclipped(denoiser), _in_float32(denoiser):
        ahead, behind = (
            functional_call(
                denoiser,
                {k: v + sign * h * direction[k] for k, v in parameters.items()},
                (z, logsnr, cond),
            )
            for sign in (1, -1)
        )
    output = (ahead + behind) / 2
    return output if clip is None else output.clamp(-clip, clip), (ahead - behind) / (2 * h)


@torch.no_grad()
def shifting_product(
    denoiser: nn.Module, direction: Mapping[str, Tensor], z: Tensor, logsnr: Tensor, cond: Cond | None
) -> tuple[Tensor, Tensor]:
    """As `difference_product`, the weights being shifted in place, and put back, to the last bit.

    For weights that are cut over processes: `direction` is cut alike, and each process shifts its own part.
    """
    clip = denoiser.clip if isinstance(denoiser, Denoiser) else None
    parameters = {k: v for k, v in denoiser.named_parameters() if k in direction}
    size = float(norm(direction))
    h = RELATIVE_STEP * float(norm(parameters)) / size if size > 0 else 1.0
    before = {k: v.clone() for k, v in parameters.items()}
    outputs = []
    with _unclipped(denoiser), _in_float32(denoiser):
        try:
            for sign in (1, -1):
                for k, v in parameters.items():
                    v.copy_(torch.add(before[k], direction[k], alpha=sign * h))
                outputs.append(denoiser(z, logsnr, cond))
        finally:
            for k, v in parameters.items():
                v.copy_(before[k])
    ahead, behind = outputs
    output = (ahead + behind) / 2
    return output if clip is None else output.clamp(-clip, clip), (ahead - behind) / (2 * h)


def choose_product(
    mode: ProductMode, denoiser: nn.Module, z: Tensor, logsnr: Tensor, cond: Cond | None
) -> tuple[str, Product]:
    """The product to use, by name: "auto" is forward mode if the network can be differentiated so.

    Args:
        mode: what was asked for.
        denoiser: g_θ.
        z: (B, …) a small input to try forward mode on.
        logsnr: (B,) its noise level.
        cond: its condition, or None.

    Raises:
        UsageError: if forward mode was asked for and fails.
    """
    if mode == "difference":
        return "difference", difference_product
    # Along a random direction: zeros would hide operations without a rule.
    generator = torch.Generator(z.device).manual_seed(0)
    direction = {
        k: torch.randn(v.shape, generator=generator, device=v.device, dtype=v.dtype)
        for k, v in denoiser.named_parameters()
    }
    try:
        forward_product(denoiser, direction, z, logsnr, cond)
    except (RuntimeError, NotImplementedError) as error:
        if mode == "auto":
            return "difference", difference_product
        reason = first_line(error)
        raise UsageError(
            f"method.product is 'forward', but forward-mode differentiation of this network fails "
            f"({reason}); use method.product=difference or auto"
        ) from None
    return "forward", forward_product


@contextmanager
def forward_mode(module: nn.Module) -> Iterator[None]:
    """Inside, `module` can be differentiated in forward mode; undone afterwards.

    Two of torch's operations need it: scaled_dot_product_attention has a forward-mode rule in its MATH form
    alone, and group_norm's fails on input that is not contiguous.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm)]
    handles = [m.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),)) for m in norms]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unclipped(denoiser: nn.Module) -> Iterator[None]:
    """Inside, estimates are not clipped."""
    clips = {m: m.clip for m in denoisers([denoiser])}
    try:
        for module in clips:
            module.clip = None
        yield
    finally:
        for module, clip in clips.items():
            module.clip = clip


@contextmanager
def _in_float32(denoiser: nn.Module) -> Iterator[None]:
    """Inside, networks compute in float32, not in bfloat16, which forward mode does not pass, nor in TF32.

    A GPU's convolutions are TF32 by default; along so short a step that made differences 5 % wrong.
    """
    precisions: dict[Denoiser, Precision] = {m: m.precision for m in denoisers([denoiser])}
    device = next(denoiser.parameters()).device
    try:
        for module in precisions:
            module.precision = "float32"
        with tf32(False), torch.autocast(device.type, enabled=False):  # whatever stands around the run
            yield
    finally:
        for module, precision in precisions.items():
            module.precision = precision


def norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """‖·‖₂ of all tensors together, a scalar; of all of each tensor that is cut over processes."""
    total = torch.stack([torch.linalg.vector_norm(t) for t in tensors.values()]).norm()
    gather = getattr(total, "full_tensor", None)  # of a DTensor
    return gather() if gather else total
