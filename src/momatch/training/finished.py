"""What a finished run left behind, for a run that goes on from it: its student's and auxiliary's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from momatch.interop.load import load_student
from momatch.models.model import Model
from momatch.networks.lora import AdaptedNetwork
from momatch.training import checkpoint, sharding
from momatch.utils.errors import ConfigError
from momatch.utils.files import read_tensors
from momatch.utils.run_folder import RunFolder

Weights = dict[str, Tensor]
PREFIX = "auxiliary.network."  # in checkpoints


def finished(run: str, teacher: Model) -> tuple[Weights, Weights]:
    """The weights of the networks of student and auxiliary of the run in a folder.

    The auxiliary comes from auxiliary.safetensors, which distill --keep-auxiliary writes, or else from the
    newest checkpoint.

    Raises:
        ConfigError: if the run has no auxiliary any more, or not of this teacher's kind.
        ModelError: if it has no student.
    """
    student, folder = load_student(run), RunFolder(Path(run))
    known = student.provenance.inputs.teacher
    if known is not None and known != teacher.fingerprint():
        raise ConfigError(
            f"the student of {run} was distilled from another teacher; name that one by teacher"
        )
    auxiliary = {}
    if folder.auxiliary.is_file():
        auxiliary = read_tensors(folder.auxiliary)[0]
    elif saved := checkpoint.paths(folder.checkpoints):
        tensors = read_tensors(saved[-1])[0]
        auxiliary = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
    shapes = {name: value.shape for name, value in teacher.denoiser.unwrapped.network.state_dict().items()}
    if {name: value.shape for name, value in auxiliary.items()} != shapes:
        kept = "an auxiliary of another shape than its teacher" if auxiliary else "no auxiliary"
        raise ConfigError(
            f"the run {run} has {kept}; distil it with --keep-auxiliary, by alternating or joint"
        )
    weights = student.denoiser.network.state_dict()
    if {name: value.shape for name, value in weights.items()} != shapes:
        raise ConfigError(
            f"the student of {run} has another shape than its teacher: it was made for several steps"
        )
    return weights, auxiliary


def auxiliary_weights(trainable: Mapping[str, nn.Module]) -> Weights:
    """What auxiliary.safetensors holds: the weights of the auxiliary's network, an adapter merged into them.

    Whole, also where they are cut over processes: all of these must ask.
    """
    network = trainable["auxiliary"].get_submodule("network")
    plain = network.merged() if isinstance(network, AdaptedNetwork) else network
    return {name: sharding.whole(value) for name, value in plain.state_dict().items()}
