"""Training algorithms: each a class whose `step(step, batch)` says which networks learn what."""

from momatch.methods.alternating import Alternating
from momatch.methods.denoising import Denoising
from momatch.methods.instant import Instant
from momatch.methods.transition import Transition

__all__ = ["Alternating", "Denoising", "Instant", "Transition"]
