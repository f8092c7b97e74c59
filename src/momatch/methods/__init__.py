"""Training algorithms: each a class whose `step(step, batch)` says which networks learn what."""

from momatch.methods.alternating import Alternating
from momatch.methods.denoising import Denoising

__all__ = ["Alternating", "Denoising"]
