"""momatch's own networks as one file of Python that needs torch and diffusers alone, for others' machines."""

from __future__ import annotations

import ast
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from momatch import __version__
from momatch.models.model import Model
from momatch.networks import configs, embedding, unet, uvit
from momatch.networks.configs import UNetConfig, UViTConfig

NETWORK = Path(__file__).with_name("moment_matching_network.py")
MODULES = (configs, embedding, unet, uvit)  # each needs those before it alone
HEADER = '''"""The networks of momatch's students, called as diffusers calls its own.

Put together by momatch {version} from its own source files; it needs torch and diffusers alone.
"""

from __future__ import annotations

'''


def source() -> str:
    """The file: the sources one after another, without what they import from each other."""
    imports: set[str] = set()
    bodies = []
    for path in (*(Path(str(module.__file__)) for module in MODULES), NETWORK):
        text = path.read_text()
        tree = ast.parse(text)
        found = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports |= {ast.unparse(node) for node in found if not _own(node)}
        start = max(node.end_lineno or 0 for node in found)
        about = (ast.get_docstring(tree) or "").splitlines()[0]
        bodies.append(f"# {path.name}: {about}\n\n" + "\n".join(text.splitlines()[start:]).strip())
    order = sorted(imports, key=lambda line: (line.startswith("from"), line))
    return HEADER.format(version=__version__) + "\n".join(order) + "\n\n" + "\n\n\n".join(bodies) + "\n"


def _own(node: ast.Import | ast.ImportFrom) -> bool:
    module = (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
    return module.split(".")[0] in ("momatch", "__future__")


def save(model: Model, directory: Path) -> list[str]:
    """Save a student's U-Net or U-ViT, and the file beside it; returns its entry in model_index.json."""
    from momatch.interop.export.moment_matching_network import MASK, TEXT, MomentMatchingNetwork

    shape = model.network
    assert isinstance(shape, UNetConfig | UViTConfig)
    nulls = {
        name: null
        for name, null in model.denoiser.null_values.items()
        if name in (TEXT, MASK) and isinstance(null, Tensor)
    }
    channels, height, width = model.sample_shape
    network: Any = MomentMatchingNetwork(
        family="unet" if isinstance(shape, UNetConfig) else "uvit",
        shape=asdict(shape),
        in_channels=channels,
        sample_size=height if height == width else [height, width],
        null_shapes={name: list(null.shape) for name, null in nulls.items()},
    )
    network.network.load_state_dict(model.denoiser.network.state_dict())
    for name, null in nulls.items():
        getattr(network, f"null_{name}").copy_(null)
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # safetensors takes no other
    network.save_pretrained(directory, safe_serialization=True)
    (directory / NETWORK.name).write_text(source())
    return [NETWORK.stem, MomentMatchingNetwork.__name__]
