"""Where else a run's numbers and previews go: TensorBoard, W&B, MLflow or trackio, if installed.

The run's own log stays what resuming and reports read; a tracker is only told. None by default.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from momatch.config.schema import to_json
from momatch.training import distributed
from momatch.training.run import Event, Run
from momatch.utils.errors import UsageError

PROJECT = "momatch"


class Tracker(Protocol):
    """What is told of a run."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers by name, at a step."""
        ...

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture's file."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        package = _module("torch.utils.tensorboard", "tensorboard")
        self.writer = package.SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", str(config))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """As scalars."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Height, width, channels."""
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class Wandb:
    """Weights & Biases, or trackio, which has the same interface."""

    def __init__(self, folder: Path, config: dict[str, Any], package: str = "wandb"):
        self.package = _module(package, package)
        self.package.init(project=PROJECT, name=folder.name, config=config)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """In one call."""
        self.package.log(numbers, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """As the package's own kind of image."""
        self.package.log({name: self.package.Image(str(path))}, step=step)

    def close(self) -> None:
        """Ends the run there."""
        self.package.finish()


class Mlflow:
    """MLflow, at the place that its own variables name."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.package = _module("mlflow", "mlflow")
        self.package.set_experiment(PROJECT)
        self.package.start_run(run_name=folder.name)
        self.package.log_dict(config, "config.json")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """In one call."""
        self.package.log_metrics(numbers, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """As an artifact."""
        self.package.log_artifact(str(path), name)

    def close(self) -> None:
        """Ends the run there."""
        self.package.end_run()


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": lambda folder, config: Wandb(folder, config, "trackio"),
}


def check_names(names: str) -> list[str]:
    """Names separated by commas, as a list.

    Raises:
        UsageError: naming one that is not known.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in TRACKERS:
            raise UsageError(f"--track {name} is not known; use {', '.join(TRACKERS)}")
    return found


@contextlib.contextmanager
def tracked(names: Sequence[str], run: Run) -> Iterator[Callable[[Event], None]]:
    """Gives what tells all these trackers of an event; only the main process has any.

    Raises:
        UsageError: if a package is not installed.
    """
    folder = run.directory or Path(PROJECT)
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        for name in names if distributed.is_main() else ():
            trackers.append(TRACKERS[name](folder, to_json(run.config)))
            stack.callback(trackers[-1].close)

        def tell(event: Event) -> None:
            numbers = dict(event.record.metrics)
            if event.look:
                numbers["preview_frechet"] = event.look.frechet
            for tracker in trackers:
                if numbers:
                    tracker.log(event.record.step, numbers)
                if event.look and event.look.grid and event.look.grid.endswith(".png"):
                    tracker.image(event.record.step, "preview", folder / event.look.grid)

        yield tell


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"--track {package} needs a package; pip install {package}") from None
