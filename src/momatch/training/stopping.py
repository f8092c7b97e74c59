"""Ending a run early: when its numbers stop getting better, or are as good as noise lets them be seen."""

from __future__ import annotations

from collections import deque

from momatch.config.schema import StoppingConfig
from momatch.training.monitor import Look


class Smoothed:
    """Mean and standard error of the last `window` logged values of one metric.

    The loss of Algorithm 3 is unbiased but noisy: two independent minibatches make one number.

    Args:
        name: of the metric; it must be logged as `name`.
        window: how many values; with fewer nothing is said.
    """

    def __init__(self, name: str, window: int):
        self.name = name
        self.values: deque[float] = deque(maxlen=window)

    def update(self, metrics: dict[str, float]) -> dict[str, float]:
        """{"NAME_mean": …, "NAME_error": …} once the window is full, from metrics that hold NAME; else {}."""
        if self.name not in metrics:
            return {}
        self.values.append(metrics[self.name])
        n = len(self.values)
        if n < (self.values.maxlen or 0):
            return {}
        mean = sum(self.values) / n
        variance = sum((value - mean) ** 2 for value in self.values) / (n - 1)
        return {f"{self.name}_mean": mean, f"{self.name}_error": (variance / n) ** 0.5}


class Stopper:
    """Watches looks and smoothed losses, and says when to stop and why.

    Args:
        config: the rules.
        vanishing: name of the metric that falls to 0 as the student gets right, if the method logs one.

    The loss of Algorithm 3 may rise while the learning rate warms up, in students that get better: that it
    has not fallen is said only of what follows its highest value.
    """

    def __init__(self, config: StoppingConfig, vanishing: str = "instant_loss"):
        self.config, self.vanishing = config, vanishing
        self.best = float("inf")
        self.looks_without_better = 0
        self.highest, self.lowest = float("-inf"), float("inf")
        self.values_without_lower = self.values_within_noise = 0

    def see_look(self, look: Look) -> bool:
        """Whether this look is the best so far."""
        return self.see(look.frechet)

    def see(self, frechet: float) -> bool:
        """Whether this Fréchet distance is the best so far."""
        if frechet < self.best:
            self.best, self.looks_without_better = frechet, 0
            return True
        self.looks_without_better += 1
        return False

    def reason(self, metrics: dict[str, float]) -> str | None:
        """Why to stop now, as half a sentence; None to go on."""
        patience, factor, window = self.config.patience, self.config.within_noise, self.config.window
        if patience and self.looks_without_better >= patience:
            return f"{patience} previews without a Fréchet distance below {self.best:.3g}"
        mean, error = metrics.get(f"{self.vanishing}_mean"), metrics.get(f"{self.vanishing}_error")
        if not factor or mean is None or error is None:
            return None
        # One outlier makes mean and error alike, for as long as it is in the window: it must not decide.
        self.values_within_noise = self.values_within_noise + 1 if mean < factor * error else 0
        if self.values_within_noise > window:
            return f"the smoothed loss {mean:.3g} is within {factor:g} standard errors ({error:.2g}) of 0"
        rose, fell = mean > self.highest + factor * error, mean < self.lowest - factor * error
        if rose:
            self.highest = mean
        if rose or fell:
            self.lowest, self.values_without_lower = mean, 0
            return None
        self.values_without_lower += 1
        if self.values_without_lower >= window:
            return (
                f"the smoothed loss {mean:.3g} has not fallen by {factor:g} standard errors ({error:.2g}) "
                f"below {self.lowest:.3g} in {window} logged values"
            )
        return None
