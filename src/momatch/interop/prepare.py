"""Running a pipeline's encoders once over pictures and captions, and keeping what they say in shards.

    for done in prepare("pictures", config, "latents"):     # goes on at the first shard that is missing
        ...
    data = momatch.load_data("latents")

What is stored is described in `data.prepared` and docs/data.md.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from momatch.data import prepared
from momatch.data.collections import Collection, Item, digest
from momatch.data.reading import Reading
from momatch.data.records import check_labels
from momatch.data.rows import opened
from momatch.data.sources import BY_NAME, open_collection
from momatch.interop.encoders import Encoders, SentenceEncoders
from momatch.utils import devices
from momatch.utils.errors import Notice, UsageError
from momatch.utils.files import fingerprint, write_atomically
from momatch.utils.run_folder import RunFolder, exclusive

READERS = 4  # threads that decode pictures while the encoders work
MARK = "settings and contents"  # in the header of a shard: fingerprints of both
UNCHANGING = (
    *("teacher", "text_encoder", "batch_size", "captions", "device"),
    *("max_megapixels", "anywhere", "skip_unreadable", "empty_captions", "num_classes", "renumber_labels"),
)
PATHS = ("source", "pipeline")  # settings that may change: the folders were moved


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how.

    Attributes:
        teacher: folder of the diffusers pipeline whose encoders are used.
        image_size: side of the pictures, cut to their central square; 0 takes the pipeline's own.
        batch_size: pictures encoded at a time.
        shard_size: samples in a file; a run that is stopped loses less than one.
        dtype: of latents and embeddings as stored; they are computed and used in float32.
        posterior: "sample" keeps one draw of the autoencoder's distribution, as training by its pipeline
            does; "mean" keeps its mean.
        captions: "ignore" leaves captions out, for a pipeline without a text encoder.
        caption_field: which field or column is the caption, if it has no usual name.
        label_field: which is the label.
        num_classes: how many classes there are, where labels are some of a larger set; 0 counts them.
        renumber_labels: labels that are some of a larger set are numbered anew, from 0, in their order.
        empty_captions: pictures without a caption have the empty one, where others have theirs.
        max_megapixels: million pixels of a picture that are read at most; 0 is Pillow's limit, about 179.
        anywhere: metadata may name pictures outside their folder.
        skip_unreadable: up to so many pictures that cannot be read are left out; 0 refuses the first.
        seed: of the draws.
        text_encoder: instead of a pipeline: "minilm-l6" encodes captions by all-MiniLM-L6-v2 (the extra
            `text`) and leaves pictures as they are, for a pixel teacher of your own; "minilm-l6-128" does so
            in the way of the built-in emoji, for teachers of those.
        device: where a pipeline's encoders run: cpu, cuda, cuda:1; auto is a GPU if there is one.
    """

    teacher: str = ""
    image_size: int = 0
    batch_size: int = 16
    shard_size: int = 1024
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    posterior: Literal["sample", "mean"] = "sample"
    captions: Literal["use", "ignore"] = "use"
    caption_field: str = ""
    label_field: str = ""
    num_classes: int = 0
    renumber_labels: bool = False
    empty_captions: bool = False
    max_megapixels: int = 0
    anywhere: bool = False
    skip_unreadable: int = 0
    seed: int = 0
    text_encoder: Literal["", "minilm-l6", "minilm-l6-128"] = ""
    device: str = devices.AUTO

    @property
    def reading(self) -> Reading:
        """How the source is read; what concerns texts is not asked for here."""
        shared = {each.name for each in fields(self)} & {each.name for each in fields(Reading)}
        return Reading(**{name: getattr(self, name) for name in shared})


@dataclass(frozen=True)
class Done:
    """How far it is.

    Attributes:
        samples: that are encoded, those of earlier runs included.
        total: how many there will be.
        new: those that this run has encoded.
        seconds: that it took.
    """

    samples: int
    total: int
    new: int
    seconds: float


def prepare(source: str, config: PrepareConfig, out: str | Path) -> Generator[Done, None, None]:
    """Encode all samples of a source into a folder; shards that are there already stay.

    Args:
        source: a folder of pictures, an .npz, tars or hf:ORG/NAME[:SPLIT], as `load_data` takes them.
        config: how.
        out: the folder.

    Yields:
        A `Done` after every batch. Leaving early loses the shard under way, nothing else.

    Raises:
        UsageError: if source, pipeline or folder cannot be used; shards written so far stay.
        OSError: if the disk is full.
    """
    _check(source, config)
    pictures = open_collection(source, config.reading)
    if pictures.labels:
        check_labels(pictures.labels, len(pictures.class_names), config.num_classes, source)
    encoders = _encoders(config)
    with_captions = _with_captions(source, pictures, encoders, config)
    if not pictures.is_plain:
        warnings.warn(pictures.summary(), Notice, stacklevel=2)
    settings = _settings(source, config, pictures, encoders, with_captions)
    folder = Path(out)
    with _claimed(folder, settings):
        work = _Work(folder, pictures, encoders, config, settings, with_captions)
        yield from work.run()
        work.finish()


class _Work:
    """One run over the shards of a folder."""

    def __init__(
        self,
        folder: Path,
        source: Collection,
        encoders: Encoders | SentenceEncoders,
        config: PrepareConfig,
        settings: dict[str, Any],
        with_captions: bool,
    ):
        self.folder, self.source, self.encoders = folder, source, encoders
        self.config, self.settings, self.with_captions = config, settings, with_captions
        self.mark = _mark(settings)
        self.dtype = prepared.DTYPES[config.dtype]
        size, n = config.shard_size, len(source)
        self.shards = [range(first, min(first + size, n)) for first in range(0, n, size)]

    def run(self) -> Iterator[Done]:
        """Make the shards that are missing."""
        missing = [i for i, rows in enumerate(self.shards) if not self._is_done(i, len(rows))]
        samples = sum(len(rows) for i, rows in enumerate(self.shards) if i not in set(missing))
        start, before = time.monotonic(), samples
        yield Done(samples, len(self.source), 0, 0.0)
        if not missing and (self.folder / prepared.INDEX).is_file():
            return
        self.encoders.load()
        if self.with_captions:
            self._write(self.folder / prepared.NULL_CONDITION, self._stored(self.encoders.null_condition()))
        with ThreadPoolExecutor(READERS) as pool:
            for shard in missing:
                for count in self._make(shard, pool):
                    samples += count
                    yield Done(samples, len(self.source), samples - before, time.monotonic() - start)

    def finish(self) -> None:
        """Write the index, once all shards are there."""
        files = [prepared.shard_path(self.folder, i) for i in range(len(self.shards))]
        labels = torch.cat([prepared.read_tensors(file, prepared.LABELS)[prepared.LABELS] for file in files])
        tensors = {
            name: {"shape": list(t.shape[1:]), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in prepared.read_tensors(files[0]).items()
        }
        index = {
            "format": prepared.FORMAT,
            "settings": self.settings,
            "captions": self.with_captions,
            "num_classes": max(
                self.config.num_classes or int(labels.max()) + 1, len(self.source.class_names)
            ),
            "class_names": list(self.source.class_names),
            "tensors": tensors,
            "shards": [{"file": f.name, "rows": len(r)} for f, r in zip(files, self.shards, strict=True)],
        }
        _write_json(self.folder / prepared.INDEX, index)

    def _make(self, shard: int, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Encode and write one shard; yields the size of every batch, of the last once all is on disk."""
        rows, size = self.shards[shard], self.config.batch_size
        parts: list[dict[str, Tensor]] = []
        captions: list[str] = []
        batches = [rows[first : first + size] for first in range(0, len(rows), size)]
        reading = self._read(batches[0], pool)
        for i, batch in enumerate(batches):
            items = list(reading)
            reading = self._read(batches[i + 1], pool) if i + 1 < len(batches) else iter(())
            parts.append(self._stored(self._encode(items, batch)))
            captions += [item.caption or "" for item in items]
            if i + 1 < len(batches):
                yield len(batch)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        path = prepared.shard_path(self.folder, shard)
        if self.with_captions:
            _write_json(path.with_suffix(".json"), captions)
        self._write(path, tensors)
        yield len(batches[-1])

    def _read(self, rows: range, pool: ThreadPoolExecutor) -> Iterator[Item]:
        size = self.encoders.image_size
        return pool.map(lambda i: self.source.item(i, size, smooth=True), rows)

    def _encode(self, items: Sequence[Item], rows: range) -> dict[str, Tensor]:
        found = self.encoders.pictures(items, rows)
        if self.with_captions:
            found.update(self.encoders.prompts([item.caption or "" for item in items]))
        labels = [item.label or 0 for item in items]
        for item in items:
            if item.label is not None and item.label < 0:
                raise UsageError(f"{item.name} has the label {item.label}; labels count from 0")
        return {**found, prepared.LABELS: torch.tensor(labels, dtype=torch.int64)}

    def _stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As they are kept: floating point in the dtype asked for."""
        found = {}
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
                if not bool(tensor.isfinite().all()):
                    raise UsageError(
                        f"{name} has values that {self.config.dtype} cannot hold; use --dtype float32, and "
                        "look at the pictures and the pipeline if that fails too"
                    )
            found[name] = tensor.contiguous()
        return found

    def _is_done(self, shard: int, rows: int) -> bool:
        path = prepared.shard_path(self.folder, shard)
        if not path.is_file() or (self.with_captions and not path.with_suffix(".json").is_file()):
            return False
        try:
            file = opened(path)
            whole = file.get_slice(prepared.LABELS).get_shape() == [rows]
            return whole and (file.metadata() or {}).get(MARK, "").split(" ")[0] == self.mark
        except UsageError:  # damaged: it is made again
            return False

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        # One entry: safetensors writes several in any order, and the same shard must be the same bytes.
        marks = {MARK: f"{self.mark} {fingerprint(tensors)}"}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=marks))


def _check(source: str, config: PrepareConfig) -> None:
    for name in ("batch_size", "shard_size"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.image_size < 0:
        raise UsageError(f"image_size is {config.image_size}; give the side in pixels, or leave it out")
    if bool(config.teacher) == bool(config.text_encoder):
        raise UsageError(
            "give one of --teacher PIPELINE_FOLDER and --text-encoder minilm-l6: what encodes the captions"
        )
    if config.text_encoder and config.captions == "ignore":
        raise UsageError(f"--text-encoder {config.text_encoder} is for captions; leave --captions ignore out")
    if source in BY_NAME or prepared.is_prepared(Path(source)):
        raise UsageError(f"{source!r} needs no preparation; use it as data as it is")


def _encoders(config: PrepareConfig) -> Encoders | SentenceEncoders:
    if config.text_encoder:
        return SentenceEncoders(config.image_size, config.text_encoder)
    return Encoders(config.teacher, config.image_size, config.posterior, config.seed, config.device)


def _with_captions(
    source: str, pictures: Collection, encoders: Encoders | SentenceEncoders, config: PrepareConfig
) -> bool:
    if config.captions == "ignore":
        return False
    if pictures.has_captions and not encoders.has_text:
        raise UsageError(
            f"{source} has captions, but the pipeline {config.teacher} has no text encoder; use "
            "--captions ignore, or another pipeline"
        )
    if encoders.has_text and not pictures.has_captions:
        lacks = f"but {source} has no captions: {pictures.caption_help}"
        if config.teacher:
            raise UsageError(f"the pipeline {config.teacher} is asked by prompts, {lacks}")
        raise UsageError(
            f"--text-encoder is for captions, {lacks}. Without captions there is nothing to prepare: give "
            f"train-teacher --data {source} as it is"
        )
    return pictures.has_captions


def _settings(
    source: str,
    config: PrepareConfig,
    pictures: Collection,
    encoders: Encoders | SentenceEncoders,
    with_captions: bool,
) -> dict[str, Any]:
    """All that the contents of the shards depend on."""
    wanted = {name: value for name, value in asdict(config).items() if name not in UNCHANGING}
    made_by = {"pipeline": str(Path(config.teacher).resolve())} if config.teacher else {}
    return {
        **wanted,
        **({"renumber_labels": True} if config.renumber_labels else {}),  # unknown to earlier versions
        "source": source,
        **(made_by or {"text_encoder": config.text_encoder}),
        "image_size": encoders.image_size,
        "captions": with_captions,
        "encoders": encoders.fingerprint,
        "channels": encoders.channels,
        "samples": len(pictures),
        "source_files": pictures.identity(),
    }


@contextmanager
def _claimed(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Make `folder` that of these settings, and keep other processes out of it."""
    with exclusive(folder, "preparing"):
        _claim(folder, settings)
        yield


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / prepared.SETTINGS
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{path} is damaged ({error}); choose another --out or delete {folder}"
            ) from None
        changed = [
            f"{key} {found.get(key)!r}, now {value!r}"
            for key, value in settings.items()
            if key not in PATHS and found.get(key) != value
        ]
        if changed and any(folder.glob("shard-*")):
            raise UsageError(
                f"{folder} was prepared from other data or settings ({'; '.join(changed[:3])}); choose "
                "another --out, or delete that folder"
            )
    elif not RunFolder(folder).is_empty:
        raise UsageError(f"{folder} is not empty and holds no prepared data; choose another --out")
    _write_json(path, settings)


def _mark(settings: dict[str, Any]) -> str:
    fixed = {key: value for key, value in settings.items() if key not in PATHS}
    return digest([json.dumps(fixed, sort_keys=True)])


def _write_json(path: Path, contents: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(contents, indent=1) + "\n"))
