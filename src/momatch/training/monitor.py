"""Watching a run: is it working, and has it gone wrong?

The losses of alternating training say nothing, so a run is judged by what the student makes: now and then a
small set of samples from fixed noise, a picture of some, and a cheap Fréchet distance against the *training*
pictures (the held-out ones are kept for the final evaluation). With few samples the distance is biased
upwards: compare it with itself only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from momatch.data.images import ImageSet
from momatch.data.rows import Rows, sample_of, spread
from momatch.data.tokens import Tokens
from momatch.evaluation.conditions import fixed_cond
from momatch.evaluation.features import FeatureExtractor, extract
from momatch.evaluation.frechet import frechet_distance
from momatch.evaluation.statistics import FeatureStatistics
from momatch.evaluation.tokens import listed
from momatch.interop.autoencoder import Decoder, to_pictures
from momatch.methods.base import saturation
from momatch.models.model import Model
from momatch.utils.run_folder import RunFolder, make_inside

GRID_COLUMNS, GRID_ROWS = 10, 6
REMEDY = "if this lasts, lower the learning rate, or look at the teacher's own samples"
MOST_DECODED = 2000  # latents that a look decodes, to compare with
MOST_TEXTS = 20_000  # rows of tokens that a look compares with
TEACHER_LOOK_STEPS = 16  # a teacher's own step count would cost minutes a look


@dataclass(frozen=True)
class Look:
    """What a look at the samples found.

    Attributes:
        step: of the run.
        frechet: cheap Fréchet distance.
        num_samples: behind it.
        features: the feature extractor's name.
        reference: name of the set compared with.
        grid: picture of the samples, or their texts, relative to the run's folder; None without a folder.
    """

    step: int
    frechet: float
    num_samples: int
    features: str
    reference: str
    grid: str | None


class Monitor:
    """Looks at samples of `model` and raises the alarm when a run leaves sane bounds.

    Args:
        model: what is being trained.
        data: its training pictures.
        extractor: features for the cheap distance.
        num_samples: samples a look.
        directory: the run's folder, for pictures; None keeps none.
        seed: of the noise, the same at every look.
        decoder: of a latent model: makes pictures of its samples.
    """

    def __init__(
        self,
        model: Model,
        data: ImageSet,
        extractor: FeatureExtractor,
        num_samples: int,
        directory: Path | None,
        seed: int = 0,
        decoder: Decoder | None = None,
    ):
        self.model, self.data, self.extractor = model, data, extractor
        self.num_samples, self.directory, self.seed = num_samples, directory, seed
        self.decoder, self.reference_name = decoder, data.name
        images = self._images()
        if len(images) < len(data):
            self.reference_name = f"{data.name}, {len(images)} of {len(data)}"
        self.data_mean, self.data_std = float(images.mean()), float(images.std())
        self.data_saturation = float(saturation(images))
        self.cond = fixed_cond(model, data, num_samples, data.num_classes)
        self.steps = model.steps if model.is_student else min(model.steps, TEACHER_LOOK_STEPS)
        self.best = float("inf")

    @cached_property
    def reference(self) -> FeatureStatistics:
        """Of the training pictures; extracted at the first look, since a run may end without one."""
        return FeatureStatistics.from_features(extract(self.extractor, self._images()))

    def look(self, step: int) -> tuple[Look, list[str]]:
        """Sample, measure, draw; also returns what is alarming about it."""
        samples = self.model.sample(self.num_samples, self.steps, self.cond, self.seed).cpu()
        if not bool(samples.isfinite().all()):
            return self._look(step, float("nan"), None), [
                "the samples are not finite; lower the learning rate"
            ]
        frechet = frechet_distance(
            FeatureStatistics.from_features(extract(self.extractor, samples)), self.reference
        )
        alarms = []
        if frechet > 3 * self.best:
            alarms.append(
                f"the cheap Fréchet distance rose to {frechet:.3g} from its best, {self.best:.3g}; "
                "training may be diverging: lower the learning rate"
            )
        self.best = min(self.best, frechet)
        return self._look(step, frechet, self._draw(samples, step)), alarms

    def check(self, metrics: dict[str, float]) -> list[str]:
        """What is alarming about a step's metrics; empty if nothing is."""
        alarms = []
        std, mean = metrics.get("student_std"), metrics.get("student_mean")
        if not self.data_std:  # stand-ins for pictures, in a run that uses none
            std = mean = None
        if std is not None and not 0.5 < std / self.data_std < 1.5:
            alarms.append(
                f"the student's outputs have standard deviation {std:.3g}, the data {self.data_std:.3g}; "
                f"{REMEDY}"
            )
        if mean is not None and not abs(mean - self.data_mean) < 0.5 * self.data_std:
            alarms.append(
                f"the student's outputs have mean {mean:.3g}, the data {self.data_mean:.3g}; {REMEDY}"
            )
        share = metrics.get("student_saturation", 0.0)
        if share > self.data_saturation + 0.2:
            alarms.append(
                f"{share:.0%} of the student's values lie outside ±1.1, of the data's "
                f"{self.data_saturation:.0%}; {REMEDY}"
            )
        return alarms

    def _images(self) -> torch.Tensor:
        if isinstance(self.data.images, Tokens):
            return self.data.images.subset(spread(len(self.data), MOST_TEXTS)).integers().float()
        if isinstance(self.data.images, Rows):
            return sample_of(self.data.images, max_rows=MOST_DECODED if self.decoder else None)
        return self.data.images

    def _look(self, step: int, frechet: float, grid: str | None) -> Look:
        return Look(step, frechet, self.num_samples, self.extractor.name, self.reference_name, grid)

    def _draw(self, samples: torch.Tensor, step: int) -> str | None:
        if self.directory is None:
            return None
        from momatch.evaluation.report.plots import image_grid, save_png, vector_plot

        make_inside(RunFolder(self.directory).samples)
        if self.model.of_tokens:
            name = f"samples/step-{step:08d}.txt"
            texts = listed(self.model.texts(samples[:GRID_COLUMNS]))
            (self.directory / name).write_text(texts, encoding="utf-8")
            return name
        latents = self.data.space == "latents" and self.decoder is None
        name = f"samples/step-{step:08d}{'-latents' if latents else ''}.png"
        if self.data.space == "vectors":
            shown = samples[: GRID_COLUMNS * GRID_ROWS]
            vector_plot(shown, self._images()[: len(shown)]).savefig(self.directory / name)
            return name
        pictures = to_pictures(samples[: GRID_COLUMNS * GRID_ROWS], self.decoder)
        save_png(image_grid(pictures, GRID_COLUMNS), self.directory / name)
        return name
