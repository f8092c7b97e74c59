"""The mathematics, tensors only: schedules, process, denoisers, samplers, closed forms."""

from momatch.diffusion.gaussian_mixture import GaussianMixture

__all__ = ["GaussianMixture"]
