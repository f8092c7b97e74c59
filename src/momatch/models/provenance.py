"""Where a model came from: what it was made of, and what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Role = Literal["teacher", "student"]


@dataclass(frozen=True)
class Inputs:
    """Fingerprints of what a run started from; None where that is not known.

    Attributes:
        teacher: of the teacher's weights.
        data: of the training data.
    """

    teacher: str | None = None
    data: str | None = None

    def to_json(self) -> dict[str, str]:
        """What is known."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Provenance:
    """What a model says of its origin; None where it does not say.

    Attributes:
        role: "teacher" or "student".
        teacher: of a student: as the run's config named its teacher.
        data: as the run's config named its data.
        config: all settings of the run, as its config.json; empty for a model from elsewhere.
        inputs: fingerprints.
        pipeline: folder or name of the diffusers pipeline whose autoencoder and text encoders it uses.
        scheduler: class of that pipeline's scheduler.
        text_encoder: name of a text encoder that momatch knows.
        latent: whether its samples are latents of an autoencoder.
        class_names: of its labels, in order; empty if they have none.
        vocabulary: what each of its tokens stands for, see `momatch.data.tokens`; empty if it makes none.
    """

    role: Role | None = None
    teacher: str | None = None
    data: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs = Inputs()
    pipeline: str | None = None
    scheduler: str | None = None
    text_encoder: str | None = None
    latent: bool = False
    class_names: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    @property
    def encoder(self) -> str | None:
        """What encodes its prompts: a text encoder by name, or a pipeline."""
        return self.text_encoder or self.pipeline

    def to_json(self) -> dict[str, Any]:
        """What is known, in JSON types; a copy, so that changing it leaves the record as it is."""
        found: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        found |= {"config": deepcopy(dict(self.config)), "inputs": self.inputs.to_json()}
        found |= {"class_names": list(self.class_names), "vocabulary": list(self.vocabulary)}
        found["vae"] = found.pop("latent")  # the entry's first name; earlier versions look for no other
        return {name: value for name, value in found.items() if value}


UNKNOWN = Provenance()  # frozen, so that all who say nothing of their origin can share it


def from_json(given: Mapping[str, Any]) -> Provenance:
    """The inverse of `to_json`. Entries that others have added, or left null, are passed over.

    Raises:
        ValueError: if an entry has the wrong type.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"info is {given!r}, not an object")
    given = {name: value for name, value in given.items() if value is not None}
    known: dict[str, Any] = {each.name: given[each.name] for each in fields(Provenance) if each.name in given}
    latent, vae = given.get("latent", False), given.get("vae", False)  # vae: once the autoencoder's scale
    for name, value, kinds in (("latent", latent, bool), ("vae", vae, bool | Mapping)):
        if not isinstance(value, kinds):
            raise ValueError(f"info.{name} is {value!r}, neither true nor false")
    known["latent"] = bool(latent or vae)
    for name in ("class_names", "vocabulary"):
        texts = known.get(name, ())
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"info.{name} is {texts!r}, not a list of texts")
        known[name] = tuple(texts)
    inputs, config, role = known.pop("inputs", {}), deepcopy(known.get("config", {})), known.get("role")
    for name, value in (("inputs", inputs), ("config", config)):
        if not isinstance(value, Mapping):
            raise ValueError(f"info.{name} is {value!r}, not an object")
    if role is not None and role not in get_args(Role):
        raise ValueError(f"info.role is {role!r}, neither teacher nor student")
    prints = {each.name: inputs.get(each.name) for each in fields(Inputs)}
    texts = {key: known.get(key) for key in ("teacher", "data", "pipeline", "scheduler", "text_encoder")}
    for name, value in (*texts.items(), *prints.items()):
        if not isinstance(value, str | None):
            raise ValueError(f"info.{name} is {value!r}, not a text")
    return Provenance(**{**known, "config": config}, inputs=Inputs(**prints))
