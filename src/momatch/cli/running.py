"""How the networks of a command run: where, how many samples at a time, how exactly, compiled or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from momatch.cli.parsing import UNNAMED, OptionalInt
from momatch.diffusion.compilation import compiled, resolved
from momatch.diffusion.precision import Precision
from momatch.models.model import Model
from momatch.utils import devices

MODES = {"default": "default", "graph": "reduce-overhead"}  # as torch.compile calls them


@dataclass(frozen=True)
class Running:
    """How networks run.

    Attributes:
        batch_size: samples that a network is given at a time, 1 to 256; fewer need less memory and give the
            same samples, but for rounding. What memory holds, if left out.
        device: where networks run: cpu, cuda, cuda:1; auto is a GPU if there is one. The same seed gives
            other samples on a GPU than on the CPU.
        precision: of the networks' arithmetic: tf32 and bfloat16 are quicker on a GPU, and round.
        compile: default compiles networks by torch.compile, which takes a minute at the first sample; graph
            records them as CUDA graphs, too, which small networks gain most from.
    """

    batch_size: OptionalInt = None
    device: str = devices.AUTO
    precision: Precision = "float32"
    compile: Literal["none", "default", "graph"] = "none"

    def prepare(self, model: Model) -> Model:
        """The model where it is to run, and as it is to run there; its weights move.

        Raises:
            UsageError: if there is no such device, or none that records graphs.
        """
        device = devices.resolve(self.device)
        resolved(self.compile, device, 0)
        model = model.to(device)
        model = replace(model, denoiser=model.denoiser.in_precision(self.precision))
        if self.compile != "none":
            compiled(model.denoiser, MODES[self.compile])
        return model


RunningOptions = Annotated[Running, UNNAMED]
