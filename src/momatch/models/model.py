"""A model that can be used: denoiser, schedule, sample shape and step count, saved and loaded as a folder.

Teachers and students are kept in the same form:

    model.safetensors    the network's weights
    model.json           its family and shape, prediction type, schedule, sample shape, steps and origin
    null-condition.safetensors   where "nothing asked for" is a tensor: the embedding of an empty prompt, say
    second-moments.safetensors   beside a teacher that momatch trained: Adam's v̂, which Algorithm 3 needs
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from momatch.data.tokens import decode
from momatch.diffusion import conventions, process, schedules
from momatch.diffusion.categorical import CategoricalDenoiser, CategoricalProcess, with_noise
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import Cond, DenoiserFunction, Process
from momatch.diffusion.precision import tf32
from momatch.diffusion.process import GAUSSIAN
from momatch.diffusion.sampling import ETAS, SamplerName, ancestral, in_batches
from momatch.diffusion.schedules import NoiseSchedule
from momatch.diffusion.solvers import SOLVERS, SolverName, solve
from momatch.models import batch_size as batch_sizes
from momatch.models import provenance
from momatch.models.provenance import UNKNOWN, Provenance
from momatch.models.request import CHUNK, check_request
from momatch.networks import registry
from momatch.networks.configs import TokenTransformerConfig
from momatch.networks.lora import AdaptedNetwork
from momatch.utils.errors import UsageError
from momatch.utils.files import (
    DamagedFileError,
    as_path,
    fingerprint,
    read_tensors,
    write_atomically,
    write_tensors,
)
from momatch.utils.run_folder import SECOND_MOMENTS
from momatch.utils.text import first_line

FORMAT = "momatch-model-1"
MOST_SIDE = 2**16  # of a sample, in numbers
NULL_CONDITION = "null-condition.safetensors"


class ModelError(UsageError):
    """A folder that does not hold a usable model; the message says why and what to do."""


@dataclass(frozen=True, repr=False, init=False)
class Model:
    """A denoiser with all that sampling from it needs.

    Attributes:
        denoiser: the network and its prediction type.
        network: the network's shape, one of `momatch.networks.configs`.
        schedule: λ(t) to sample with.
        sample_shape: shape of one sample, e.g. (1, 8, 8); of tokens (L,).
        steps: network calls that `sample` makes unless told otherwise; of an elastic student its most.
        num_classes: labels it can be asked for; 0 if it takes none.
        provenance: where it came from; may be given as a dictionary, as in model.json's "info".
        folder: where it was loaded from, or None.
        cond_shapes: shape of one sample's part of each entry of cond, other than label, e.g.
            {"encoder_hidden_states": (-1, 768)}; −1 where any length will do.
        sampler: its steps unless told otherwise: "ancestral", Algorithm 1; or what another algorithm made it
            for, "ddim" or "renoise" (see `momatch.diffusion.sampling.ETAS`); or a solver of
            `momatch.diffusion.solvers`.
        process: the noising process: Gaussian, or masked or uniform of a model of tokens.
    """

    denoiser: Denoiser
    network: registry.NetworkConfig
    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]
    steps: int
    num_classes: int = 0
    provenance: Provenance = UNKNOWN
    folder: Path | None = None
    cond_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sampler: SamplerName | SolverName = "ancestral"
    process: Process = GAUSSIAN

    def __init__(
        self,
        denoiser: Denoiser,
        network: registry.NetworkConfig,
        schedule: NoiseSchedule,
        sample_shape: tuple[int, ...],
        steps: int,
        num_classes: int = 0,
        provenance: Provenance | Mapping[str, Any] = UNKNOWN,
        folder: Path | None = None,
        cond_shapes: dict[str, tuple[int, ...]] | None = None,
        sampler: SamplerName | SolverName = "ancestral",
        process: Process = GAUSSIAN,
        *,
        info: Mapping[str, Any] | None = None,
    ):
        """As the attributes; `info`, the provenance's former name, is taken instead of it if given.

        Raises:
            ModelError: if an entry of the provenance has the wrong type.
        """
        # Written by hand, since a generated one cannot take `info`, which is a property too.
        known = {
            "denoiser": denoiser,
            "network": network,
            "schedule": schedule,
            "sample_shape": sample_shape,
            "steps": steps,
            "num_classes": num_classes,
            "provenance": self._origin(provenance if info is None else info),
            "folder": folder,
            "cond_shapes": {} if cond_shapes is None else cond_shapes,
            "sampler": sampler,
            "process": process,
        }
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def _origin(self, given: Provenance | Mapping[str, Any]) -> Provenance:
        if isinstance(given, Provenance):
            return given
        try:
            return provenance.from_json(given)
        except ValueError as error:
            raise ModelError(f"{error}; correct it where the model is made, or leave it out") from None

    @property
    def info(self) -> dict[str, Any]:
        """The provenance in JSON types."""
        return self.provenance.to_json()

    @property
    def is_student(self) -> bool:
        """Whether it was distilled: its guidance is inside, and it samples in at most 16 steps."""
        return self.provenance.role == "student"

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The numbers of network calls it is made for: several for an elastic student."""
        return registry.step_counts(self.network) or (self.steps,)

    def __repr__(self) -> str:
        """One line instead of all weights."""
        size = sum(p.numel() for p in self.denoiser.parameters())
        return f"{type(self).__name__}({size:,} parameters, shape {self.sample_shape}, {self.steps} steps)"

    @property
    def of_tokens(self) -> bool:
        """Whether its samples are rows of tokens."""
        return isinstance(self.process, CategoricalProcess)

    def texts(self, tokens: Tensor) -> list[str]:
        """Samples of a model of tokens (n, L) as texts; as numbers, where it was trained on such."""
        return decode(tokens, self.provenance.vocabulary)

    @property
    def device(self) -> torch.device:
        """Where its weights are; samples are made there."""
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the weights there, in place, as a module's own `to`; returns the model itself."""
        self.denoiser.to(device)
        return self

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell this model's weights from others."""
        return fingerprint(self.denoiser.state_dict())

    def second_moments(self) -> dict[str, Tensor] | None:
        """Adam's v̂ of every parameter of `denoiser`, as training left them; None if they were not kept."""
        path = self.folder / SECOND_MOMENTS if self.folder else None
        return read_tensors(path)[0] if path and path.is_file() else None

    def sample(
        self,
        n: int,
        steps: int | None = None,
        cond: Cond | None = None,
        seed: int = 0,
        eta: float | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Draw n samples by the model's sampler: Algorithm 1, unless it was made for another.

        Args:
            n: how many.
            steps: network calls for each; `self.steps` if None.
            cond: what to ask for, such as {"label": (n,) int64}, an entry for each sample; None asks for
                nothing in particular.
            seed: the same seed gives the same n samples, and the same initial noise for any n and steps;
                others on a GPU than on the CPU, whose random numbers differ.
            eta: 1 = ancestral, 0 = DDIM, infinity = all noise anew; None = the model's own.
            batch_size: samples that the network is given at a time, 1 to 256; fewer need less memory. The
                noise is the same whatever it is, so samples are, up to the rounding of kernels. None: 256,
                or what free memory holds of samples larger than 64×64×3 numbers.

        Returns:
            (n, *sample_shape) float32, on the model's device; pictures live in [−1, 1] but are not clipped.
            Of tokens (n, L) int64; `texts` decodes them.

        Raises:
            UsageError: if n, steps, a label, eta or batch_size is out of range.
        """
        return torch.cat(list(self.sample_chunks(n, steps, cond, seed, eta, batch_size)))

    def sample_chunks(
        self,
        n: int,
        steps: int | None = None,
        cond: Cond | None = None,
        seed: int = 0,
        eta: float | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Tensor]:
        """As `sample`, 256 samples at a time whatever the batch size."""
        steps = self.steps if steps is None else steps
        check_request(self, n, steps, cond, seed, batch_size, eta)
        device = self.device
        was_training = self.denoiser.training
        self.denoiser.eval()
        try:
            for first in range(0, n, CHUNK):
                count = min(CHUNK, n - first)
                generator = torch.Generator(device).manual_seed(int(seed) * 1_000_003 + first // CHUNK)
                like = torch.empty((CHUNK, *self._noise_shape), device=device)
                noise = self.process.prior(like, generator)[:count]
                chunk_cond = (
                    {k: v[first : first + count].to(device) for k, v in cond.items()} if cond else None
                )
                if self._is_told_steps:
                    chunk_cond = self._with_steps(chunk_cond, count, steps)
                if batch_size is None:  # with the chunk's noise and condition in memory
                    start = self.schedule(torch.ones(1, device=device)).expand(count)
                    batch_size = batch_sizes.fitting(self.denoiser, noise, start, chunk_cond)
                denoiser = in_batches(self.denoiser, batch_size)
                yield self._run(denoiser, noise, steps, chunk_cond, generator, eta)
        finally:
            self.denoiser.train(was_training)

    def _run(
        self,
        denoiser: DenoiserFunction,
        noise: Tensor,
        steps: int,
        cond: Cond | None,
        generator: torch.Generator,
        eta: float | None,
    ) -> Tensor:
        """Samples from noise, by the model's own sampler if no stochasticity is given."""
        if size := registry.noise_dim(self.network):
            denoiser = with_noise(denoiser, size, generator)
        with tf32(self.denoiser.unwrapped.precision == "tf32"):
            if eta is None and self.sampler in SOLVERS:
                return solve(self.sampler, denoiser, noise, steps, self.schedule, cond)
            eta = ETAS[self.sampler] if eta is None else eta
            x = ancestral(denoiser, noise, steps, self.schedule, cond, generator, eta, self.process)
            return self.process.finished(x)

    @property
    def _noise_shape(self) -> tuple[int, ...]:
        """Of one z: a sample's, tokens one-hot."""
        kinds = (self.network.num_tokens,) if isinstance(self.network, TokenTransformerConfig) else ()
        return (*self.sample_shape, *kinds)

    @property
    def _is_told_steps(self) -> bool:
        return bool(registry.step_counts(self.network))

    def _with_steps(self, cond: Cond | None, count: int, steps: int) -> Cond:
        """What an elastic student is asked: the condition, or nothing in particular, and its steps."""
        asked = self.denoiser.null_batch(count, self.device) if cond is None else cond
        return {**asked, "steps": torch.full((count,), float(steps), device=self.device)}

    def check_request(
        self, n: int, steps: int, cond: Cond | None, seed: int = 0, batch_size: int | None = None
    ) -> None:
        """Refuse what this model cannot sample.

        Raises:
            UsageError: naming the value and what is allowed.
        """
        check_request(self, n, steps, cond, seed, batch_size)

    def save(self, directory: str | Path) -> None:
        """Write the model's folder; an existing one is replaced. An adapter is merged into the weights.

        Raises:
            ModelError: if the denoiser is guided or clipped: only a network and its prediction type can be
                saved.
        """
        if self.denoiser.unwrapped is not self.denoiser:
            raise ModelError(
                f"a model with a {type(self.denoiser).__name__} denoiser cannot be saved; save the plain "
                "one, and guide it again after loading"
            )
        directory = as_path(directory, "the folder to save in")
        directory.mkdir(parents=True, exist_ok=True)
        network = self.denoiser.network
        plain = network.merged() if isinstance(network, AdaptedNetwork) else network
        weights = {k: v.detach().cpu().contiguous() for k, v in plain.state_dict().items()}
        nulls = self.denoiser.null_values
        tensors = {k: v.detach().cpu().contiguous() for k, v in nulls.items() if isinstance(v, Tensor)}
        description = {
            "format": FORMAT,
            "network": registry.to_json(self.network),
            "prediction": self.denoiser.prediction,
            "sigma_data": self.denoiser.sigma_data,
            "clip": self.denoiser.clip,
            "time": {"name": self.denoiser.time.name, **self.denoiser.time.options},
            "null_values": {k: v for k, v in nulls.items() if k not in tensors},
            "schedule": {"name": self.schedule.name, **self.schedule.options},
            "sample_shape": list(self.sample_shape),
            "steps": self.steps,
            **({} if self.sampler == "ancestral" else {"sampler": self.sampler}),
            **({"process": self.process.kind} if isinstance(self.process, CategoricalProcess) else {}),
            "num_classes": self.num_classes,
            "cond_shapes": {k: list(v) for k, v in self.cond_shapes.items()},
            "info": self.info,
        }
        write_tensors(directory / "model.safetensors", weights)
        if tensors:
            write_tensors(directory / NULL_CONDITION, tensors)
        write_atomically(
            directory / "model.json", lambda path: path.write_text(json.dumps(description, indent=2) + "\n")
        )


class Student(Model):
    """A distilled model: a `Model` whose `steps` is what it was trained for; its role is always "student"."""

    def _origin(self, given: Provenance | Mapping[str, Any]) -> Provenance:
        return replace(super()._origin(given), role="student")


def load_model(directory: str | Path) -> Model:
    """Load a folder that `Model.save` wrote.

    Raises:
        ModelError: if the folder is missing, incomplete, damaged or of another program.
    """
    directory = Path(directory)
    path = directory / "model.json"
    if not directory.exists():
        raise ModelError(f"there is no folder {directory}; give that of a teacher, student or run")
    if not path.is_file():
        raise ModelError(
            f"{directory} holds no model (no model.json); give the folder of a teacher, student or run"
        )
    try:
        description = json.loads(path.read_text())
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            found = description.get("format") if isinstance(description, dict) else description
            raise ModelError(f"{path} has format {found!r}, this program reads {FORMAT!r}")
        return _from_description(description, directory)
    except ModelError:
        raise
    except DamagedFileError as error:
        raise ModelError(str(error)) from None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        reason = first_line(e)
        raise ModelError(
            f"the model in {directory} cannot be read ({type(e).__name__}: {reason}); "
            "copy it again, or train it again"
        ) from None


def _from_description(description: dict[str, Any], directory: Path) -> Model:
    """The model that model.json describes; raises whatever a damaged description makes it raise."""
    config = registry.from_json(description["network"])
    schedule = schedules.build(**description["schedule"])
    ends = schedule(torch.linspace(0, 1, 101, dtype=torch.float64))
    if not bool(ends.isfinite().all() and (ends.diff() < 0).all()):
        raise ValueError("its schedule does not fall from a finite logSNR to another")
    if description["prediction"] not in get_args(process.Prediction):
        raise ValueError(f"unknown prediction type {description['prediction']!r}")
    weights = read_tensors(directory / "model.safetensors")[0]
    shape = tuple(operator.index(size) for size in description["sample_shape"])
    if not shape or not 1 <= min(shape) <= max(shape) <= MOST_SIDE:
        raise ValueError(f"a sample cannot have the shape {shape}")
    registry.check_fit(config, weights, shape)
    with torch.random.fork_rng(devices=[]):
        network = registry.build(config)
    for name, tensor in network.state_dict().items():
        if name in weights and weights[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"its weights {name} are {weights[name].dtype}")
    network.load_state_dict(weights)
    num_classes = operator.index(description["num_classes"])
    nulls = description.get("null_values", {"label": num_classes} if num_classes else {})
    _check_classes(num_classes, nulls.get("label", 0), getattr(config, "num_classes", None))
    clip = description.get("clip")
    if clip is not None and not (isinstance(clip, int | float) and 0 < clip < math.inf):
        raise ValueError(f"its clip is {clip!r}")
    if (directory / NULL_CONDITION).is_file():
        nulls = {**nulls, **read_tensors(directory / NULL_CONDITION)[0]}
    kind_of_process = description.get("process")
    if (kind_of_process is None) == isinstance(config, TokenTransformerConfig):
        raise ValueError(f"its network and its process, {kind_of_process!r}, do not fit each other")
    if kind_of_process is not None:
        noising: Process = CategoricalProcess(kind_of_process)
        denoiser: Denoiser = CategoricalDenoiser(network, kind_of_process, nulls)
    else:
        noising = GAUSSIAN
        denoiser = Denoiser(
            network,
            description["prediction"],
            nulls,
            conventions.build(**description.get("time", {"name": "logsnr"})),
            float(description.get("sigma_data", process.SIGMA_DATA)),
            clip,
        )
    sampler = description.get("sampler", "ancestral")
    if sampler not in (*ETAS, *SOLVERS):
        raise ValueError(f"unknown sampler {sampler!r}")
    known = provenance.from_json(description["info"])
    kind = Student if known.role == "student" else Model
    return kind(
        denoiser=denoiser.eval(),
        network=config,
        schedule=schedule,
        sample_shape=shape,
        steps=operator.index(description["steps"]),
        num_classes=num_classes,
        cond_shapes={k: tuple(v) for k, v in description.get("cond_shapes", {}).items()},
        sampler=sampler,
        provenance=known,
        folder=directory,
        process=noising,
    )


def _check_classes(num_classes: int, null: Any, known: int | None) -> None:
    """Refuse classes, or a label for none of them, that a network of momatch's own does not know."""
    if num_classes < 0 or (known is not None and num_classes > known):
        raise ValueError(f"it has {num_classes} classes, its network {known}")
    if known is not None and not (isinstance(null, int) and 0 <= null <= known):
        raise ValueError(f"its label for no class is {null!r}, its network knows 0 to {known}")
