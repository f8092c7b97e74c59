"""Tiny pipelines, made once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_pipelines
from PIL import Image

N = 104


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Name → folder; made when first asked for."""
    folder, made = tmp_path_factory.mktemp("pipelines"), {}

    def pipeline(name, **options):
        key = f"{name}{options or ''}"
        if key not in made:
            made[key] = getattr(tiny_pipelines, name)(folder / f"{name}-{len(made)}", **options)
        return made[key]

    return pipeline


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """A folder of pictures with captions and labels, some not square, some grey."""
    folder = tmp_path_factory.mktemp("captioned") / "pictures"
    folder.mkdir()
    random = np.random.default_rng(2)
    words, lines = tiny_pipelines.WORDS, []
    for i in range(N):
        shape = (20, 20) if i % 5 == 4 else (24, 18, 3) if i % 2 else (16, 16, 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:03d}.png")
        caption = " ".join(random.choice(words, 1 + i % 6))
        lines.append({"file_name": f"{i:03d}.png", "text": caption, "label": i % 2})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def prepared(pipelines, captioned, tmp_path_factory):
    """The captioned pictures, prepared for a pipeline at full precision; made when first asked for."""
    from momatch.interop.prepare import PrepareConfig, prepare

    folder, made = tmp_path_factory.mktemp("prepared"), {}

    def data(name, **options):
        if name not in made:
            config = PrepareConfig(
                str(pipelines(name, **options)), tiny_pipelines.SIZE, dtype="float32", shard_size=40
            )
            for _ in prepare(str(captioned), config, folder / name):
                pass
            made[name] = folder / name
        return made[name]

    return data
