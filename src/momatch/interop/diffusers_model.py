"""Teachers of the diffusers library: a pipeline's folder, a model's with its scheduler, or a checkpoint's.

pipeline/                          model/
model_index.json                   config.json
unet/ or transformer/              diffusion_pytorch_model.safetensors
scheduler/                         scheduler_config.json, or scheduler/ in it or beside it

The oldest pipelines keep the files of their network beside model_index.json. Their training scripts leave
checkpoint-500/unet and checkpoint-500/unet_ema in the folder of the pipeline that they end with.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

from momatch.data.image_io import is_pointer
from momatch.diffusion.denoiser import Denoiser
from momatch.interop import diffusers_scheduler as noise
from momatch.interop.lora_files import with_adapter
from momatch.interop.pipelines import AUTOENCODERS, quiet
from momatch.models.model import Model, ModelError
from momatch.models.provenance import Provenance
from momatch.networks.configs import DiffusersConfig
from momatch.networks.diffusers import DiffusersNetwork, family_of, library
from momatch.networks.families.family import Family, Sides
from momatch.utils.errors import Notice, UsageError
from momatch.utils.text import first_line

# What the first DiT and PixArt pipelines call their network, by its norm_type.
EXPORTED = "MomentMatchingNetwork"  # class of our own networks in an exported folder
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
STEPS = 64  # network calls that such a teacher samples with unless told otherwise
CHECKPOINT_PARTS = ("unet_ema", "unet", "transformer_ema", "transformer")  # the averaged weights first
VARIANT = re.compile(r"diffusion_pytorch_model\.([a-z]\w*)(-\d+-of-\d+)?\.safetensors")
HUB_FILES = [
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "diffusion_pytorch_model*.safetensors*",
    *(f"{part}/*.json" for part in ("scheduler", "unet", "transformer", *AUTOENCODERS)),
    *(f"{part}/diffusion_pytorch_model*.safetensors" for part in ("unet", "transformer")),
]


def is_folder(path: Path) -> bool:
    """Whether this looks like something that diffusers saved."""
    return (
        (path / "model_index.json").is_file()
        or "_class_name" in _read(path / "config.json")
        or _checkpoint_part(path) is not None
    )


def from_hub(name: str) -> Path:
    """Fetch what a teacher needs of a repository: configs, and weights as safetensors.

    Args:
        name: "organisation/name".

    Raises:
        ModelError: if the hub does not give it.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(
            f"{name} is no folder here, and fetching it from the hub needs huggingface_hub, which is not "
            "installed; pip install 'momatch[diffusers]'"
        ) from None
    try:
        return Path(
            snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*.fp16*", "*non_ema*"])
        )
    except Exception as error:
        reason = first_line(error)
        raise ModelError(
            f"{name} is no folder here, and the hub does not give it ({type(error).__name__}: {reason}); "
            "check the name, or the connection"
        ) from None


def load(
    folder: Path,
    null_label: int | None = None,
    size: int | Sides | None = None,
    pipeline: str | None = None,
    scheduler: str | Path | None = None,
    record: str = "",
    adapter: str | Path | None = None,
    weights: Path | None = None,
) -> Model:
    """The teacher in a folder of diffusers.

    Args:
        folder: of a pipeline, of a model, or of a checkpoint of training.
        null_label: the label of a UNet2DModel that stands for "no class", if it was trained with one.
        size: side or sides of what it makes (pixels, or latents), if not what its config says.
        pipeline: what to call it in the provenance; the folder if None.
        scheduler: the folder whose scheduler_config.json says with what noise it was trained, if its own
            does not.
        record: where the record of its class is, "package.module:NAME", if momatch has none.
        adapter: the folder of a LoRA adapter that is merged into its weights.
        weights: a .safetensors to be read in place of the folder's own, in diffusers' layout or the original
            one, as `from_single_file` of diffusers reads it.

    Raises:
        UsageError: if something is missing, unknown to momatch, or has to be told.
    """
    part = _network_folder(folder)
    config = _read(part / "config.json")
    class_name = str(config.get("_class_name"))
    if class_name == "Transformer2DModel":
        class_name = LEGACY.get(str(config.get("norm_type")), class_name)
    if class_name == EXPORTED:
        raise UsageError(
            f"{folder} is a student that momatch has exported for diffusers to open; give momatch itself the "
            "folder of the run or of the student that it was made of"
        )
    family = family_of(class_name, record)
    if null_label is not None and not family.null_label:
        raise UsageError(f"null_label {null_label} is for a UNet2DModel with classes, not a {class_name}")
    model = _network(part, class_name) if weights is None else _of_file(weights, part, class_name)
    if adapter is not None:
        model = with_adapter(model, Path(adapter))
    known = inspect.signature(type(model).__init__).parameters  # an average's config has entries of its own
    plain = {key: value for key, value in model.config.items() if key in known}
    found: dict[str, Any] = json.loads(json.dumps(plain))
    shape = _sample_shape(family, found, size)
    trained_with = _scheduler_config(folder, part, scheduler)
    tokens = family.count_tokens(found, shape)
    heard = noise.read(trained_with, tokens, family.time_unit, family.mu, STEPS)
    if _read(_home(folder) / "model_index.json").get("requires_aesthetics_score"):
        raise UsageError(
            f"{folder} is a refiner (requires_aesthetics_score): trained on little noise alone, it cannot "
            "sample from pure noise; distil the base model"
        )
    asked = family.asked({**found, "null_label": null_label})
    network = DiffusersConfig(class_name, found, heard.negated != family.negated, heard.score, record)
    origin = _provenance(folder, trained_with, pipeline)
    denoiser = Denoiser(
        DiffusersNetwork(network, model),
        heard.prediction,
        asked.nulls,
        heard.time,
        heard.sigma_data,
        heard.clip,
    )
    return Model(
        denoiser.eval(),
        network,
        heard.schedule,
        shape,
        STEPS,
        asked.num_classes,
        origin,
        cond_shapes=dict(asked.shapes),
    )


def _provenance(folder: Path, scheduler: dict[str, Any], pipeline: str | None) -> Provenance:
    """Where it came from, and whether it makes latents."""
    home = _home(folder)
    latent = any(_read(home / part / "config.json") for part in AUTOENCODERS)
    name = pipeline or str(home.resolve())
    return Provenance("teacher", pipeline=name, scheduler=scheduler["_class_name"], latent=latent)


def _home(folder: Path) -> Path:
    """The pipeline that a folder belongs to, if it is part of one, or of a checkpoint in its folder."""
    for place in (folder, *list(folder.resolve().parents)[:2]):
        if (place / "model_index.json").is_file():
            return place
    return folder


def _checkpoint_part(folder: Path) -> Path | None:
    """The network in a checkpoint of diffusers' training scripts; None if the folder is none."""
    parts = (folder / name for name in CHECKPOINT_PARTS)
    return next((part for part in parts if "_class_name" in _read(part / "config.json")), None)


def _network_folder(folder: Path) -> Path:
    whole = (folder / "model_index.json").is_file()
    for part in ("unet", "transformer") if whole else ():
        if (folder / part / "config.json").is_file():
            return folder / part
    if "_class_name" in _read(folder / "config.json"):
        return folder
    part = None if whole else _checkpoint_part(folder)
    if part is None:
        raise ModelError(f"the pipeline {folder} has no unet/config.json and no transformer/config.json")
    plain = part.name.removesuffix("_ema")
    if part.name != plain and (folder / plain).is_dir():
        warnings.warn(
            f"{part} is the teacher, the average of the weights; name {folder / plain} for the last weights",
            Notice,
            stacklevel=4,
        )
    return part


def _scheduler_config(folder: Path, part: Path, scheduler: str | Path | None) -> dict[str, Any]:
    places = (folder, part, part.parent, _home(folder)) if scheduler is None else (Path(scheduler),)
    for place in places:
        for path in (place / "scheduler" / "scheduler_config.json", place / "scheduler_config.json"):
            if path.is_file():
                return _read(path)
    if scheduler is not None:
        raise ModelError(
            f"{scheduler} has no scheduler_config.json; give the folder of a pipeline's scheduler"
        )
    raise ModelError(
        f"{folder} does not say with what noise the network was trained; put the scheduler_config.json of "
        "its training (or pipeline) into it, or name its folder: load_teacher(…, scheduler=FOLDER)"
    )


def _network(part: Path, class_name: str) -> Any:
    """The network with its weights, in float32."""
    if not any(part.glob("*.safetensors")):
        others = sorted(path.name for pattern in ("*.bin", "*.ckpt", "*.pt") for path in part.glob(pattern))
        if others:
            raise ModelError(
                f"{part} holds weights as {others[0]}, a format that can run code, which momatch does not "
                f'read; convert them: python -c "from diffusers import {class_name} as M; '
                f"M.from_pretrained('{part}', use_safetensors=False).save_pretrained('{part}')\""
            )
        raise ModelError(f"{part} holds no weights (no .safetensors)")
    for path in part.glob("*.safetensors"):
        if is_pointer(path):
            raise ModelError(f"{path} is a pointer of Git LFS, not the weights; run git lfs pull")
    kind = getattr(library(), class_name)
    try:
        with quiet():  # diffusers remarks on entries that an average's config has
            model, report = kind.from_pretrained(
                part,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant=_variant(part),
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = first_line(error)
        raise ModelError(f"diffusers cannot load the {class_name} in {part}: {reason}") from None
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise ModelError(f"the weights in {part} lack {len(wrong)} of its {class_name}, such as {wrong[0]}")
    return model.float().eval()


def _of_file(weights: Path, part: Path, class_name: str) -> Any:
    """The network with the weights of a single file and the config in a folder, in float32."""
    kind = getattr(library(), class_name)
    if is_pointer(weights):
        raise ModelError(f"{weights} is a pointer of Git LFS, not the weights; run git lfs pull")
    if not hasattr(kind, "from_single_file"):
        raise ModelError(
            f"diffusers reads no {class_name} from a single file such as {weights}; give a folder"
        )
    try:
        with quiet():
            model = kind.from_single_file(str(weights), config=str(part), local_files_only=True)
            lacking = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    except Exception as error:  # its converters raise whatever a file of another layout makes them raise
        raise ModelError(
            f"diffusers cannot make a {class_name} as {part} describes it of {weights} "
            f"({type(error).__name__}: {first_line(error)}); name the folder of a pipeline of its kind"
        ) from None
    if lacking:
        raise ModelError(
            f"{weights} lacks {len(lacking)} weights of the {class_name} in {part}, such as {lacking[0]}; "
            "name the folder of a pipeline of its kind"
        )
    return model.float().eval()


def _variant(part: Path) -> str | None:
    """What files of weights are called after, if there are none without such a word: fp16, say."""
    names = sorted(path.name for path in part.glob("diffusion_pytorch_model*.safetensors"))
    found = [match[1] if (match := VARIANT.fullmatch(name)) else None for name in names]
    return None if None in found or not found else "fp16" if "fp16" in found else found[0]


def _sample_shape(family: Family, config: dict[str, Any], size: int | Sides | None) -> tuple[int, ...]:
    """(C, …) of what it makes."""
    channels, out = family.channels(config)
    if out not in (channels, 2 * channels):
        raise UsageError(
            f"this {family.class_name} takes {channels} channels and gives {out}; momatch needs one that "
            "gives what it takes (no inpainting, no instructions)"
        )
    sides = family.sides(config) if size is None else size
    if sides is None:
        raise UsageError(
            f"this {family.class_name} does not say how large its samples are; give their side, as size=64 "
            "or --teacher-size 64"
        )
    if isinstance(sides, int) and family.dims == 2:
        sides = (sides, sides)
    sides = (sides,) if isinstance(sides, int) else tuple(int(side) for side in sides)
    if len(sides) != family.dims:
        names = " ".join(("FRAMES", "HEIGHT", "WIDTH")[-family.dims :]) if family.dims > 1 else "LENGTH"
        raise UsageError(
            f"the samples of a {family.class_name} have {family.dims} sides, but "
            f"{'×'.join(map(str, sides))} was given; give all of them: --teacher-sides {names}"
        )
    return (channels // family.packed, *sides)


def _read(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; nothing if it is missing or holds something else."""
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_text())
    except ValueError:
        raise ModelError(f"{path} is damaged: it is not JSON") from None
    return contents if isinstance(contents, dict) else {}
