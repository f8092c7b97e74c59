"""What a training algorithm is, what goes in and out of one step of it, and what it declares of itself.

A new algorithm is one file beside this one: a `Method`, and the `MethodConfig` that builds it. Nothing else
names it; the command line, plan, progress, report and checkpoints read what the two declare.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from momatch.diffusion.interface import Cond, cond_rows
from momatch.diffusion.process import per_sample
from momatch.diffusion.sampling import SamplerName
from momatch.utils.seeding import Generator, normal, part_of, uniform
from momatch.utils.settings import settings

if TYPE_CHECKING:
    from momatch.methods.context import Context

__all__ = [
    "Average",
    "Batch",
    "Deviation",
    "Method",
    "MethodConfig",
    "Metric",
    "Update",
    "Wrapper",
    "alone",
    "per_sample",
    "sample_statistics",
    "saturation",
]


@dataclass(frozen=True)
class Batch:
    """A minibatch and the source of all randomness spent on it.

    Attributes:
        x: (B, …) clean data.
        cond: condition of each sample, or None.
        generator: on x's device; seeded by the run's seed and the step, so a step can be repeated exactly.
            Where other processes hold parts of the batch, a `RowsGenerator`: draw by `normal` and `uniform`.
        rows: (B,) which rows of the data they are, on the CPU, so that a method can look up what a tensor
            cannot hold, such as prompts; None where they come from no table.
    """

    x: Tensor
    cond: Cond | None
    generator: Generator
    rows: Tensor | None = None

    def halves(self) -> tuple[Batch, Batch]:
        """Two independent minibatches of half the size, drawing from the same generator."""
        size = len(self.x) // 2
        cut = slice(size), slice(size, 2 * size)
        first, second = (self._part(rows) for rows in cut)
        return first, second

    def _part(self, part: slice) -> Batch:
        rows = None if self.rows is None else self.rows[part]
        source = self.generator if isinstance(self.generator, torch.Generator) else self.generator.half()
        return Batch(self.x[part], cond_rows(self.cond, part), source, rows)

    def parts(self, count: int) -> list[Batch]:
        """Equal parts, one after another, of which each draws what its rows draw in the whole."""
        size = len(self.x) // count
        found = []
        for i in range(count):
            cut = slice(i * size, (i + 1) * size)
            rows = None if self.rows is None else self.rows[cut]
            found.append(
                Batch(self.x[cut], cond_rows(self.cond, cut), part_of(self.generator, i, count), rows)
            )
        return found

    def normal(self) -> Tensor:
        """ε ~ N(0, I) in the shape of x."""
        return normal(self.x, self.generator)

    def uniform(self, rows: int = 1) -> Tensor:
        """(rows, B) numbers from U[0, 1)."""
        return uniform((rows, len(self.x)), self.x, self.generator)

    def generator_of(self, rows: Tensor) -> Generator:
        """Source of noise for `rows` (M,) int64 of the batch alone, which are chosen as the step goes."""
        source = self.generator
        return source if isinstance(source, torch.Generator) else source.only(rows, len(self.x))


Average = Callable[[Iterable[Tensor]], None]  # makes each, in place, its mean over all processes


def alone(tensors: Iterable[Tensor]) -> None:
    """The `Average` of a single process: nothing to do."""


@dataclass(frozen=True)
class Deviation:
    """The standard deviation of all values; not a number yet, since other processes may hold more of them."""

    values: Tensor

    def __float__(self) -> float:
        return float(self.values.std())


Metric = Tensor | Deviation


@dataclass(frozen=True)
class Update:
    """What one step wants done.

    Attributes:
        losses: for each role that learns in this step, the scalar to descend. Each reaches its own role's
            parameters only. A mean over the batch, so that the mean over parts of it is that of all.
        metrics: computes the numbers worth logging; called at logging steps alone, since it costs time. Each
            is a mean over the batch too, or a `Deviation`.
    """

    losses: dict[str, Tensor]
    metrics: Callable[[], Mapping[str, Metric]]


class Method(ABC):
    """A training algorithm. What it needs beyond `trainable` and `step` has defaults that fit most."""

    @property
    @abstractmethod
    def trainable(self) -> Mapping[str, nn.Module]:
        """The networks that learn, by role ("student", "auxiliary", …). Each gets an optimizer of its own."""

    @abstractmethod
    def step(self, step: int, batch: Batch) -> Update:
        """Iteration `step` of the algorithm: a pure function of (step, batch, weights), no hidden counter."""

    def after_update(self, step: int) -> None:  # noqa: B027 (most methods have nothing to do)
        """Called once the optimizers have acted on what `step(step, …)` gave: to move an average, say."""

    def variant(self, step: int) -> Hashable | None:
        """Which operations `step` runs: steps of one variant run the same, on other numbers.

        Updates can then be recorded once and replayed, if nothing in `step` waits for the device, looks at
        `batch.rows`, or depends on the step's number otherwise. None, for a step like no other, is always
        right.
        """
        return None

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """The networks that a step calls and does not train, by role."""
        return {}

    @property
    def kept(self) -> Mapping[str, nn.Module]:
        """What else a checkpoint must hold, by name: an average, say. It has no optimizer."""
        return {}

    @property
    def optimizer_overrides(self) -> Mapping[str, Mapping[str, Any]]:
        """Optimizer settings that differ from the run's, by role: {"auxiliary": {"beta1": 0.9}}."""
        return {}


class Wrapper(Method):
    """A method around another one, whose declarations are its own unless it says otherwise."""

    def __init__(self, method: Method):
        self.method = method

    @property
    def trainable(self) -> Mapping[str, nn.Module]:
        """The inner method's."""
        return self.method.trainable

    def variant(self, step: int) -> Hashable | None:
        """The inner method's."""
        return self.method.variant(step)

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """The inner method's."""
        return self.method.frozen

    @property
    def kept(self) -> Mapping[str, nn.Module]:
        """The inner method's."""
        return self.method.kept

    @property
    def optimizer_overrides(self) -> Mapping[str, Mapping[str, Any]]:
        """The inner method's."""
        return self.method.optimizer_overrides


@settings("method")
class MethodConfig:
    """The settings of an algorithm, and what others must know of it before it is built.

    Attributes:
        name: what `--method` calls it.
        learning: the roles that learn; each is a network of the teacher's shape.
        minibatches: how many of train.batch_size a step takes.
        headline: the logged metric that says how a run goes.
        label: what that metric is, for the axis of a plot.
        caption: the same in a sentence or two, for the report.
        vanishing: a logged metric that falls to 0 on average as the student gets right, if there is one: a
            stopping rule can read it.
        signed: whether the headline may be negative, and is plotted on a plain axis, not a logarithmic one.
        elastic: whether it can train one student for several numbers of steps.
        teacher_copies: tensors in the shape of all the teacher's weights that a step holds besides.
        sampler: how its students are sampled; see `momatch.diffusion.sampling.ETAS`.
        whole_batch: whether a step must see its whole minibatch at once, which then cannot be cut into parts.
        draws_posterior: whether a setting "posterior" means anything to it.
        of_tokens: whether it is for teachers that make tokens, and for no others.
        most_steps: of its students.
        full_rollouts: samples in all k steps of the student that a step makes first, for each minibatch.
    """

    name: ClassVar[str] = ""
    learning: ClassVar[tuple[str, ...]] = ("student",)
    minibatches: ClassVar[int] = 1
    headline: ClassVar[str] = "loss"
    label: ClassVar[str] = "loss"
    caption: ClassVar[str] = "The loss."
    vanishing: ClassVar[str | None] = None
    signed: ClassVar[bool] = False
    elastic: ClassVar[bool] = False
    teacher_copies: ClassVar[int] = 0
    whole_batch: ClassVar[bool] = False
    draws_posterior: ClassVar[bool] = True
    full_rollouts: ClassVar[int] = 0
    of_tokens: ClassVar[bool] = False
    most_steps: ClassVar[int] = 16

    def forward_units(self, guided: bool) -> int:
        """Cost of a step in forward passes of one network on one minibatch; a backward pass counts as two.

        Args:
            guided: whether the teacher is, so that each of its passes counts twice.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what a step costs")

    @property
    def sampler(self) -> SamplerName:
        """See above."""
        return "ancestral"

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.name

    @property
    def needs_data(self) -> bool:
        """Whether it looks at the data themselves, for which rollouts of the student cannot stand in."""
        return False

    @property
    def bounds(self) -> Mapping[str, tuple[float, str]]:
        """Logged metrics above which there is an alarm, each with the bound, and what to do about it."""
        return {}

    @property
    def student_noise(self) -> int:
        """Numbers of noise that the student's network is given at each position, beside z."""
        return 0

    @property
    def learning_at_once(self) -> int:
        """How many networks keep activations for their backward passes at the same time."""
        return 1

    def build(self, context: Context) -> Method:
        """The algorithm itself, on the networks and data of a run."""
        raise NotImplementedError(f"{type(self).__name__} does not build a method")


def sample_statistics(x_tilde: Tensor) -> dict[str, Metric]:
    """Mean, standard deviation and share of saturated values (|x̃| > 1.1) of what the student makes."""
    return {
        "student_mean": x_tilde.mean(),
        "student_std": Deviation(x_tilde),
        "student_saturation": saturation(x_tilde),
    }


def saturation(values: Tensor) -> Tensor:
    """Share of the values that lie outside ±1.1: none of pictures, more than a quarter of latents."""
    return (values.abs() > 1.1).float().mean()
