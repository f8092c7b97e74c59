"""A run: a method, its batches, its monitor and its folder, put together from a config.

    run = distillation(teacher, data, config, directory)
    for record in run:            # trains; resumes from the folder's newest checkpoint
        ...
    student = run.finish()        # the artifact, saved as directory/student

A run's folder holds config.json, metrics.jsonl, checkpoints/, samples/, in the end student/ (or teacher/).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from momatch.config.schema import DistillConfig, RunConfig, StoppingConfig
from momatch.data.images import ImageSet
from momatch.evaluation.builtin import feature_extractor
from momatch.interop.autoencoder import decoder_of
from momatch.interop.lora_files import merged, save_adapter
from momatch.methods.base import Method
from momatch.models.model import Model
from momatch.models.provenance import Inputs
from momatch.training import checkpoint, distributed, sharding
from momatch.training.batches import Batches
from momatch.training.claims import alone_in, check_is_free, claim
from momatch.training.finished import auxiliary_weights
from momatch.training.loop import Record, state_of, train
from momatch.training.monitor import Look, Monitor
from momatch.training.stopping import Smoothed, Stopper
from momatch.utils.files import read_tensors, write_tensors
from momatch.utils.run_folder import SECOND_MOMENTS, Row, RunFolder

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
    inputs: Inputs

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
        folder = RunFolder(self.directory) if self.directory else None
        if folder:  # before a lock is put into a folder of somebody's
            distributed.on_main(lambda: check_is_free(folder))
        with alone_in(self.directory):
            if folder:
                claim(folder.path, self.config, self.inputs)
            log = _Log(folder if distributed.is_main() else None)
            if distributed.on_main(log.stopped):
                self._restore(folder)
                return
            records = train(
                self.method,
                self.batches,
                self.config.train,
                self.config.optim,
                folder.checkpoints if folder else None,
                prefetch=self.config.train.prefetch and self.data.on_disk,
            )
            try:
                yield from self._watch(records, log)
            except GeneratorExit:
                raise
            except BaseException as error:
                with contextlib.suppress(BaseException):
                    records.throw(error)  # not close(), which would save a step that the log does not have
                raise
            finally:
                records.close()
                log.close()

    def _restore(self, folder: RunFolder | None) -> None:
        """Take up what a run that has ended has learned, as resuming would."""
        if folder:
            checkpoint.restore(folder.checkpoints, state_of(self.method, self.config.optim))

    def _watch(self, records: Iterator[Record], log: _Log) -> Iterator[Event]:
        """The records with what can be seen from outside; ends early if the stopping rule says so."""
        settings, rule = self.config.monitor, self._stopping
        decoder = decoder_of(self.model) if settings.every else None
        monitor = Monitor(
            distributed.split(self.model),
            self.reference,
            feature_extractor(self.data, decoder),
            settings.num_samples,
            self.directory if distributed.is_main() else None,
            self.config.train.seed,
            decoder,
        )
        vanishing = self.config.method.vanishing or ""
        stopper, smoothed = Stopper(rule, vanishing), Smoothed(vanishing, rule.window)
        for record in records:
            if log.folder:
                log.folder.check_is_there()
            if not log.started:
                monitor.best = log.best_before(record.step)
                log.replay(record.step, smoothed, stopper)
            record.metrics.update(smoothed.update(record.metrics))
            look, alarms = None, monitor.check(record.metrics) + self._exceeded(record.metrics)
            last = record.step == self.config.train.num_steps  # a run is judged by what it ends with
            if settings.every and (record.step % settings.every == 0 or last):
                look, worse = monitor.look(record.step)
                alarms += worse
                if rule.active and distributed.on_main(lambda look=look: stopper.see_look(look)):
                    self.best.keep(self.model, look)
            reason = None
            if rule.active and (look or record.metrics):  # what differs in the last bit must not divide us
                reason = distributed.on_main(lambda record=record: stopper.reason(record.metrics))
            event = Event(record, look, alarms, reason)
            log.write(event, monitor)
            yield event
            if reason:
                return

    def _exceeded(self, metrics: dict[str, float]) -> list[str]:
        """What is above a bound that the method has set."""
        return [
            f"{name} is {metrics[name]:.3g}, above {bound:g}; {remedy}"
            for name, (bound, remedy) in self.config.method.bounds.items()
            if metrics.get(name, bound) > bound
        ]

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
        model = merged(sharding.gathered(self.model))
        model.denoiser.precision = "float32"  # that of training alone
        if self.directory:
            folder, auxiliary = RunFolder(self.directory), {}
            if isinstance(self.config, DistillConfig) and self.config.keep_auxiliary:
                auxiliary = auxiliary_weights(self.method.trainable)
            distributed.on_main(folder.check_is_there)
            distributed.on_main(lambda: self._save(model, folder, auxiliary))
        return model

    def _save(self, model: Model, folder: RunFolder, auxiliary: dict[str, torch.Tensor]) -> None:
        distilled = isinstance(self.config, DistillConfig)
        home = folder.model("student" if distilled else "teacher")
        model.save(home)
        save_adapter(self.model, home / "lora")
        if auxiliary:
            write_tensors(folder.auxiliary, auxiliary)
        if not distilled:
            moments = checkpoint.second_moments(folder.checkpoints, "teacher", self.config.optim.beta2)
            write_tensors(home / SECOND_MOMENTS, moments)


class Best:
    """The weights that made the best look so far, in memory, and as best.safetensors in the run's folder."""

    def __init__(self, directory: Path | None):
        path = self.path = RunFolder(directory).best if directory else None
        self.weights: dict[str, Tensor] = {}
        if path and distributed.on_main(path.is_file):
            self.weights = distributed.tensors_on_main(lambda: read_tensors(path)[0])
            self.weights.pop(FRECHET_KEY)

    def keep(self, model: Model, look: Look) -> None:
        """Remember the model's weights as those of this look."""
        state = model.denoiser.network.state_dict()
        self.weights = {key: sharding.whole(value.detach()).clone() for key, value in state.items()}
        if self.path and distributed.is_main():
            frechet = torch.tensor(look.frechet, dtype=torch.float64)
            write_tensors(self.path, {FRECHET_KEY: frechet, **self.weights})

    def restore(self, model: Model) -> None:
        """Put the best weights back into the model; nothing happens if there was no look."""
        if self.weights:
            sharding.load(model.denoiser.network, self.weights)


class _Log:
    """The log of a run with a folder; does nothing without."""

    def __init__(self, folder: RunFolder | None):
        self.folder = folder
        self.started = False
        self.last: Record | None = None

    def write(self, event: Event, monitor: Monitor) -> None:
        self.last = record = event.record
        if self.folder is None:
            return
        rows: list[Row] = []
        if not self.started:
            self.folder.forget_from(record.step)
            seen = dict(data_mean=monitor.data_mean, data_std=monitor.data_std)
            rows.append(dict(event="start", step=record.step, **seen, device=str(monitor.model.device)))
            self.started = True
        if record.metrics:
            rows.append(_row(record) | record.metrics)
        if event.look:
            rows.append({"event": "look", **asdict(event.look)})
        rows += [dict(event="alarm", step=record.step, message=message) for message in event.alarms]
        if event.stopped:
            rows.append(dict(event="stop", step=record.step, reason=event.stopped))
        self.folder.append(rows)

    def close(self) -> None:
        """Note how far the run came, if its last step was not one to log."""
        if self.folder and self.last and not self.last.metrics:
            self.folder.append([_row(self.last)])

    def stopped(self) -> bool:
        """Whether the stopping rule has ended this run already, and the step at which it did is saved."""
        if self.folder is None:
            return False
        ends = [row["step"] for row in self.folder.rows() if row.get("event") == "stop"]
        return bool(ends) and checkpoint.newest_step(self.folder.checkpoints) >= ends[-1]

    def best_before(self, step: int) -> float:
        """The best cheap Fréchet distance that the log holds from before `step`."""
        rows = self.folder.rows() if self.folder else []
        looks = [row["frechet"] for row in rows if row.get("event") == "look" and row["step"] < step]
        return min(looks, default=float("inf"))

    def replay(self, step: int, smoothed: Smoothed, stopper: Stopper) -> None:
        """Let a stopping rule see again what it saw before `step`, where this process takes the run up."""
        for row in self.folder.rows() if self.folder else []:
            if row["step"] >= step:
                continue
            if row.get("event") == "look":
                stopper.see(row["frechet"])
                stopper.reason({})
            elif "event" not in row:
                smoothed.update(row)
                stopper.reason(row)


def _row(record: Record) -> Row:
    return dict(step=record.step, images_seen=record.images_seen, seconds=record.seconds)
