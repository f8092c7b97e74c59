"""A run: a method, its batches, its monitor and its folder, put together from a config.

    run = distillation(teacher, data, config, directory)
    for record in run:            # trains; resumes from the folder's newest checkpoint
        ...
    student = run.finish()        # the artifact, saved as directory/student

A run's folder holds config.json, metrics.jsonl, checkpoints/, samples/, in the end student/ (or teacher/).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from momatch.config import files as config_files
from momatch.config.schema import DistillConfig, RunConfig, StoppingConfig, to_json
from momatch.data.images import ImageSet
from momatch.evaluation.builtin import feature_extractor
from momatch.interop.autoencoder import decoder_of
from momatch.interop.lora_files import merged, save_adapter
from momatch.methods.base import Method
from momatch.models.model import SECOND_MOMENTS, Model
from momatch.training import checkpoint
from momatch.training.batches import Batches
from momatch.training.loop import Record, train
from momatch.training.monitor import Look, Monitor
from momatch.training.stopping import Smoothed, Stopper
from momatch.utils.errors import ConfigError
from momatch.utils.files import write_atomically

FRECHET_KEY = "frechet of the look"  # beside the weights in best.safetensors


@dataclass(frozen=True)
class Event:
    """What a run yields after every step.

    Attributes:
        record: the training loop's record.
        look: a look at the samples, when there was one at this step.
        alarms: sentences about what left sane bounds.
        stopped: why the run ends with this step, before its last; None if it goes on.
    """

    record: Record
    look: Look | None
    alarms: list[str]
    stopped: str | None = None


@dataclass(frozen=True)
class Run:
    """A run ready to go: iterate over it to train, then call `finish`.

    Attributes:
        config: all settings.
        method: the algorithm.
        batches: step → batch.
        model: what is being trained; shares its weights with the method.
        data: the training pictures.
        directory: the run's folder, or None to keep nothing.
        reference: the pictures that looks are compared with; the training pictures, or some kept back.
        best: the best model that a look has seen.
        inputs: fingerprints of what the run starts from: its data, and its teacher if it has one.
    """

    config: RunConfig
    method: Method
    batches: Batches
    model: Model
    data: ImageSet
    directory: Path | None
    reference: ImageSet
    best: Best
    inputs: dict[str, str]

    def __iter__(self) -> Iterator[Event]:
        """As `events`."""
        return self.events()

    def events(self) -> Generator[Event, None, None]:
        """Train to the end from wherever the folder's newest checkpoint stands.

        Leaving the iteration early saves a checkpoint. A run that its stopping rule has ended stays ended.

        Raises:
            ConfigError: if the folder holds a run of another config, or another process trains in it.
            CheckpointError, NonFiniteLossError, OSError: see `momatch.training`.
        """
        with _exclusive(self.directory):
            log = _Log(self.directory, self.config, self.inputs)
            if log.stopped():
                return
            records = train(
                self.method,
                self.batches,
                self.config.train,
                self.config.optim,
                self.directory / "checkpoints" if self.directory else None,
            )
            try:
                yield from self._watch(records, log)
            finally:
                records.close()
                log.close()

    def _watch(self, records: Iterator[Record], log: _Log) -> Iterator[Event]:
        """The records with what can be seen from outside; ends early if the stopping rule says so."""
        settings, rule = self.config.monitor, self._stopping
        decoder = decoder_of(self.model) if settings.every else None
        monitor = Monitor(
            self.model,
            self.reference,
            feature_extractor(self.data, decoder),
            settings.num_samples,
            self.directory,
            self.config.train.seed,
            decoder,
        )
        vanishing = self.config.method.vanishing or ""
        stopper, smoothed = Stopper(rule, vanishing), Smoothed(vanishing, rule.window)
        stopper.best = self.best.frechet
        for record in records:
            if not log.started:
                monitor.best = log.best_before(record.step)
            record.metrics.update(smoothed.update(record.metrics))
            look, alarms = None, monitor.check(record.metrics)
            if settings.every and record.step % settings.every == 0:
                look, worse = monitor.look(record.step)
                alarms += worse
                if stopper.see_look(look) and rule.active:
                    self.best.keep(self.model, look)
            reason = stopper.reason(record.metrics)
            event = Event(record, look, alarms, reason)
            log.write(event, monitor)
            yield event
            if reason:
                return

    @property
    def _stopping(self) -> StoppingConfig:
        return self.config.stopping if isinstance(self.config, DistillConfig) else StoppingConfig()

    def finish(self) -> Model:
        """The trained model; saved as `student/` or `teacher/` in the run's folder.

        With a stopping rule it is the best that was seen. A teacher's second moments (Adam's v̂ for every
        weight) are saved beside it, as second-moments.safetensors: Algorithm 3 needs them. A student's LoRA
        adapter is merged into plain weights, and kept as student/lora/ too.
        """
        if self._stopping.active:
            self.best.restore(self.model)
        model = merged(self.model)
        model.denoiser.precision = "float32"  # that of training alone
        if self.directory:
            role = "student" if isinstance(self.config, DistillConfig) else "teacher"
            model.save(self.directory / role)
            save_adapter(self.model, self.directory / role / "lora")
            if role == "teacher":
                moments = checkpoint.second_moments(
                    self.directory / "checkpoints", "teacher", self.config.optim.beta2
                )
                checkpoint.save_tensors(self.directory / role / SECOND_MOMENTS, moments)
        return model


class Best:
    """The weights that made the best look so far, in memory, and as best.safetensors in the run's folder."""

    def __init__(self, directory: Path | None):
        self.path = directory / "best.safetensors" if directory else None
        self.frechet, self.weights = float("inf"), {}
        if self.path and self.path.is_file():
            self.weights = checkpoint.load_tensors(self.path)
            self.frechet = float(self.weights.pop(FRECHET_KEY))

    def keep(self, model: Model, look: Look) -> None:
        """Remember the model's weights as those of this look."""
        state = model.denoiser.network.state_dict()
        self.weights = {key: value.detach().clone() for key, value in state.items()}
        self.frechet = look.frechet
        if self.path:
            frechet = torch.tensor(look.frechet, dtype=torch.float64)
            checkpoint.save_tensors(self.path, {FRECHET_KEY: frechet, **self.weights})

    def restore(self, model: Model) -> None:
        """Put the best weights back into the model; nothing happens if there was no look."""
        if self.weights:
            model.denoiser.network.load_state_dict(self.weights)


@contextmanager
def _exclusive(directory: Path | None) -> Iterator[None]:
    """Holds the folder's lock, so that no two processes train in it at once; freed if the process dies."""
    if directory is None:
        yield
        return
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        if not directory.exists():
            directory.mkdir(parents=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another process is training in {directory}; wait for it, stop it, or choose another --out"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot write into {directory}: {error.strerror or error}; choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


class _Log:
    """metrics.jsonl and config.json of a run's folder; does nothing without a folder."""

    def __init__(self, directory: Path | None, config: RunConfig, inputs: dict[str, str]):
        self.path = directory / "metrics.jsonl" if directory else None
        self.started = False
        self.last: Record | None = None
        if directory:
            claim(directory, config, inputs)

    def write(self, event: Event, monitor: Monitor) -> None:
        self.last = event.record
        if self.path is None:
            return
        record = event.record
        rows: list[dict] = []
        if not self.started:
            self._drop_from(record.step)
            rows.append(
                dict(
                    event="start",
                    step=record.step,
                    data_mean=monitor.data_mean,
                    data_std=monitor.data_std,
                    device=str(monitor.model.device),
                )
            )
            self.started = True
        if record.metrics:
            rows.append(
                dict(
                    step=record.step, images_seen=record.images_seen, seconds=record.seconds, **record.metrics
                )
            )
        if event.look:
            rows.append({"event": "look", **asdict(event.look)})
        rows += [dict(event="alarm", step=record.step, message=message) for message in event.alarms]
        if event.stopped:
            rows.append(dict(event="stop", step=record.step, reason=event.stopped))
        if rows:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        """Note how far the run came, if its last step was not one to log."""
        if self.path and self.last and not self.last.metrics:
            row = dict(step=self.last.step, images_seen=self.last.images_seen, seconds=self.last.seconds)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def stopped(self) -> bool:
        """Whether the stopping rule has ended this run already."""
        if self.path is None or not self.path.exists():
            return False
        return any('"event": "stop"' in line for line in self.path.read_text().splitlines())

    def best_before(self, step: int) -> float:
        """The best cheap Fréchet distance that the log holds from before `step`."""
        if self.path is None or not self.path.exists():
            return float("inf")
        lines = [line for line in self.path.read_text().splitlines() if _step_of(line) < step]
        looks = [row for row in map(json.loads, lines) if row.get("event") == "look"]
        return min((row["frechet"] for row in looks), default=float("inf"))

    def _drop_from(self, step: int) -> None:
        """Forget lines at or after `step`: steps that a crash took back are about to be done again."""
        assert self.path is not None
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) < step]
            self.path.write_text("".join(line + "\n" for line in lines))


def claim(directory: Path, config: RunConfig, inputs: dict[str, str] | None = None) -> None:
    """Make `directory` the run folder of this config and these inputs; a folder that is so already is fine.

    Raises:
        ConfigError: if it belongs to a run of another config, or cannot be written.
    """
    path, wanted = directory / "config.json", {**to_json(config), "inputs": inputs or {}}
    if path.exists():
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ConfigError(
                f"{path} is damaged ({error}); choose another --out or delete the folder"
            ) from None
        same = {"device": None}  # a run may go on elsewhere
        changed = config_files.differences({"precision": "float32"} | found | same, wanted | same)
        begun = checkpoint.paths(directory / "checkpoints") or (directory / "metrics.jsonl").exists()
        if changed and begun:
            raise ConfigError(
                f"{directory} holds a run of another config ({'; '.join(changed[:3])}); "
                "choose another --out, or delete that folder (a run cannot be extended: its learning rate "
                "falls to 0 at its last step)"
            )
        if not changed:
            return
        (directory / SECOND_MOMENTS).unlink(missing_ok=True)  # of a run that failed before its first step
    elif directory.is_dir() and any(file.name != ".lock" for file in directory.iterdir()):
        raise ConfigError(
            f"{directory} is not empty and no run's folder (no config.json); choose another --out"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(wanted, indent=2) + "\n"))
    except OSError as error:
        raise ConfigError(
            f"cannot write into {directory}: {error.strerror or error}; choose another --out"
        ) from None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line cut short by a crash
        return float("inf")
