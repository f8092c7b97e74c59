"""What an algorithm is built from: networks, data and options of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import Cond
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods.base import Average, Batch, alone
from momatch.methods.transition import Transition
from momatch.methods.weighting import Weighting


@dataclass(frozen=True)
class Context:
    """Given to `MethodConfig.build`.

    Attributes:
        teacher: θ, guided and clipped as the run says.
        student: η, a copy of the teacher that can learn; its `schedule` and `steps` are in `transition`.
        transition: how t, z_t, x̃, s and z_s are drawn.
        weighting: w(s).
        auxiliary: makes another copy of the teacher that can learn; each call a new one. True: of an elastic
            student, the copy is told the number of steps too.
        second_moments: number of minibatches → v̂ by parameter name of `teacher`: estimated on that many, or,
            for 0, those that came with the teacher.
        finished: folder of a finished run → weights of the networks of its student and its auxiliary.
        reward: name → a reward for samples like the run's data, see methods/reward.py.
        minibatch: size → the first minibatch of that size, to try things on.
        average: makes tensors, in place, their means over all processes, where several share each minibatch.
            Gradients of `Update.losses` are averaged by the training loop; this is for what else is a mean.
        sharded: whether the networks will be cut over processes once the algorithm is built (FSDP2): they can
            then be called, and differentiated backwards, but not taken apart.
    """

    teacher: Denoiser
    student: Denoiser
    transition: Transition
    weighting: Weighting
    auxiliary: Callable[[bool], Denoiser]
    second_moments: Callable[[int], dict[str, Tensor]]
    finished: Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor]]]
    reward: Callable[[str], Callable[[Tensor, Cond | None, Tensor | None], Tensor]]
    minibatch: Callable[[int], Batch]
    average: Average = alone
    sharded: bool = False

    @property
    def schedule(self) -> NoiseSchedule:
        """The student's λ(t)."""
        return self.transition.schedule

    @property
    def steps(self) -> int:
        """The student's k, of methods that make no elastic student."""
        assert isinstance(self.transition.steps, int)
        return self.transition.steps
