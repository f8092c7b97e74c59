"""The command that draws: sample."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from tyro.conf import UseAppendAction

from momatch.cli.conditions import given_cond, label_cond, notice_other_steps, prompt_cond
from momatch.cli.parsing import (
    OptionalFloat,
    OptionalInt,
    OptionalText,
    RunName,
    check_out,
    parse,
)
from momatch.cli.running import Running, RunningOptions
from momatch.config.schema import Clip, GuidanceConfig
from momatch.diffusion.interface import Cond
from momatch.evaluation.tokens import listed
from momatch.interop.autoencoder import decoder_of, to_pictures
from momatch.interop.load import load_any
from momatch.models.model import Model
from momatch.training import distributed
from momatch.utils import devices
from momatch.utils.errors import Notice, UsageError
from momatch.utils.text import count_of

DEFAULT_OUT = Path("samples.png")
ARRAYS = (".npy", ".npz", ".safetensors")
TEXT = ".txt"


@dataclass(frozen=True)
class SampleArguments:
    """Draw images, vectors or texts from a run's model.

    Attributes:
        run: folder of a run or of a model, or "digits" for the built-in teacher.
        steps: network calls a sample; what the model was made for, if left out.
        num: how many, of all prompts together; 64, or 8 for each prompt, if left out.
        labels: classes to ask for, such as 0,1,2 or cat,dog, taken in turn; all in turn if left out.
        prompt: a text to ask for, of a model that takes text; may be given more than once, each becomes a
            column of the grid.
        cond: what to ask a model of vectors or trajectories for, NAME=FILE.npy, rows taken in turn; may be
            given more than once, for each thing that it takes.
        guidance: of a teacher, w in (1 + w) g(z, c) − w g(z, ∅), one less than diffusers' guidance_scale; a
            student has its own distilled in.
        clip: of a teacher's estimates: "static" to [−1, 1], as the emoji recipes distil; "dynamic" rescales.
        seed: of the noise; the same number of samples from the same seed are the same samples.
        eta: stochasticity: 1 is ancestral, 0 is DDIM; what the model was made for, if left out.
        running: how the network runs.
        out: a .png for a grid, in which small pictures are enlarged; or an .npz with images (uint8), and
            labels or prompts. Of vectors a .png is a plot; .npy, .npz (x, and what was asked) and
            .safetensors hold the numbers, and samples.npy is written if it is left out. Of tokens a .txt
            holds the texts, which are printed if it is left out; .npy and .npz the numbers.
    """

    run: RunName
    steps: OptionalInt = None
    num: OptionalInt = None
    labels: OptionalText = None
    prompt: UseAppendAction[tuple[str, ...]] = ()
    cond: UseAppendAction[tuple[str, ...]] = ()
    guidance: float = 0.0
    clip: Clip = "none"
    seed: int = 0
    eta: OptionalFloat = None
    running: RunningOptions = Running()
    out: Path = DEFAULT_OUT


def sample(arguments: list[str], console: Console) -> None:
    """`momatch sample RUN`."""
    parsed = parse(SampleArguments, arguments, "sample")
    check_out(parsed.out, ".png", *ARRAYS, TEXT)
    if parsed.eta is not None and not 0 <= parsed.eta <= 1:
        raise UsageError(f"--eta {parsed.eta} must lie in [0, 1]: 0 is DDIM, 1 is ancestral")
    devices.resolve(parsed.running.device)
    model = parsed.running.prepare(load_any(parsed.run))
    tokens = model.of_tokens
    vectors = len(model.sample_shape) != 3 and not tokens
    if tokens:
        if parsed.out != DEFAULT_OUT and parsed.out.suffix not in (TEXT, ".npy", ".npz"):
            raise UsageError(
                f"--out {parsed.out} must end in .txt, .npy or .npz, since this model makes tokens"
            )
    elif parsed.out.suffix == TEXT:
        raise UsageError(f"--out {parsed.out}: this model makes no text; give a .png or .npz")
    elif not vectors and parsed.out.suffix not in (".png", ".npz"):
        raise UsageError(f"--out {parsed.out} must end in .png or .npz, since this model makes pictures")
    prompts, num = parsed.prompt, parsed.num
    num = (8 * len(prompts) or 64) if num is None else num
    if 0 < num < len(prompts):
        raise UsageError(f"--num {num} is for all prompts together, and there are {len(prompts)}")
    steps = model.steps if parsed.steps is None else parsed.steps
    if parsed.cond and (prompts or parsed.labels is not None):
        raise UsageError(f"--cond {parsed.cond[0]} beside --prompt or --labels: ask by one of them")
    if parsed.cond:
        cond = given_cond(parsed.cond, max(num, 0), model)
    elif prompts:
        cond = prompt_cond(prompts, parsed.labels, max(num, 0), model)
    else:
        cond = label_cond(parsed.labels, max(num, 0), model)
    model.check_request(num, steps, cond, parsed.seed, parsed.running.batch_size)
    if parsed.guidance and cond is None and model.cond_shapes:
        raise UsageError(f"--guidance {parsed.guidance} needs something to guide to; give --prompt")
    notice_other_steps(model, [steps])
    if model.cond_shapes and not any(prompts) and not parsed.cond:
        by = "--cond" if vectors else "--prompt"
        warnings.warn(
            f"nothing is asked for, so the samples are of nothing in particular; ask by {by}",
            Notice,
            stacklevel=2,
        )
    model = guided(model, parsed.guidance, parsed.clip)
    decoder = None if vectors or tokens else decoder_of(model)
    shared = distributed.split(model)
    images = shared.sample(num, steps, cond, parsed.seed, parsed.eta, parsed.running.batch_size).cpu()
    if not distributed.is_main():
        return
    if not images.isfinite().all():
        raise UsageError(f"{parsed.run} gave samples that are not finite; its training has broken down")
    images = images if decoder is None else decoder(images)
    out = parsed.out.with_suffix(".npy") if vectors and parsed.out == DEFAULT_OUT else parsed.out
    if tokens:
        if out == DEFAULT_OUT:
            console.out(listed(model.texts(images)), end="", highlight=False)
            return
        save_tokens(out, images, model)
    elif vectors:
        save_vectors(out, images, cond)
    elif parsed.out.suffix == ".npz":
        save_npz(parsed.out, images, cond, [prompts[i % len(prompts)] for i in range(num)] if prompts else [])
    else:
        from momatch.evaluation.report.plots import image_grid, save_png

        pictures = to_pictures(images)
        save_png(image_grid(pictures, len(prompts) or grid_columns(num)), parsed.out)
    how = count_of(steps, "step")
    how += f", guided with w = {parsed.guidance:g}" if parsed.guidance else ""
    console.print(f"{num} samples in {how}: {out}", soft_wrap=True)


def guided(model: Model, scale: float, clip: Clip = "none") -> Model:
    """The model under classifier-free guidance, its estimates clipped.

    Raises:
        UsageError: if it is a student, or knows no null condition.
    """
    if not scale and clip == "none":
        return model
    if clip != "none" and model.of_tokens:
        raise UsageError(f"--clip {clip}: tokens have no range to be clipped to; leave it out")
    config = GuidanceConfig(scale=scale, clip=clip)
    if scale and model.is_student:
        raise UsageError(
            f"--guidance {scale}: a student has its guidance distilled in; give it to momatch distill as "
            "--guidance.scale, or sample the teacher"
        )
    taken = {*(["label"] if model.num_classes else []), *model.cond_shapes}
    if scale and (not taken or taken - set(model.denoiser.null_values)):
        raise UsageError(f"--guidance {scale}: this model has no null condition to guide away from")
    return replace(model, denoiser=config.apply(model.denoiser))


def save_npz(path: Path, samples: Tensor, cond: Cond | None, prompts: Sequence[str] = ()) -> None:
    """Pictures as `images` (uint8), latents not decoded as `latents` (float32); and what was asked."""
    import numpy as np

    arrays: dict[str, Any] = {"labels": cond["label"].numpy()} if cond and "label" in cond else {}
    arrays |= {"prompts": np.array(prompts)} if prompts else {}
    if samples.shape[1] in (1, 3):
        pixels = samples.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        np.savez_compressed(path, images=pixels, **arrays)
    else:
        np.savez_compressed(path, latents=samples.float().numpy(), **arrays)


def save_tokens(path: Path, samples: Tensor, model: Model) -> None:
    """Texts as .txt, each under a line of its own; integers (N, L) as .npy, with the vocabulary as .npz."""
    import numpy as np

    if path.suffix == TEXT:
        path.write_text(listed(model.texts(samples)), encoding="utf-8")
    elif path.suffix == ".npz":
        known = model.provenance.vocabulary
        words: dict[str, Any] = {"vocabulary": np.array(known)} if known else {}
        np.savez_compressed(path, tokens=samples.numpy(), **words)
    else:
        np.save(path, samples.numpy())


def save_vectors(path: Path, samples: Tensor, cond: Cond | None) -> None:
    """The numbers (N, …) as .npy; with what was asked as .npz or .safetensors; or a plot as .png."""
    import numpy as np

    arrays = {"x": samples.float(), **(cond or {})}
    if path.suffix == ".png":
        from momatch.evaluation.report.plots import vector_plot

        vector_plot(samples).savefig(path, dpi=150)
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: rows.contiguous() for name, rows in arrays.items()}, path)
    elif path.suffix == ".npz":
        numbers: dict[str, Any] = {name: rows.numpy() for name, rows in arrays.items()}
        np.savez(path, **numbers)
    else:
        np.save(path, samples.float().numpy())


def grid_columns(num: int) -> int:
    """Columns that make a grid of `num` pictures about square."""
    return max(1, round(num**0.5))
