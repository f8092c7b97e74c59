"""Pictures of one grey level, folders and tars of them."""

from __future__ import annotations

import io
import tarfile

from PIL import Image


def png(level=0, size=(4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, level).save(stream, format="PNG")
    return stream.getvalue()


def put(root, files):
    """Files by name: a level for a picture, or contents."""
    for name, contents in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(contents) if isinstance(contents, int) else contents)
    return root


def tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, contents in files.items():
            contents = png(contents) if isinstance(contents, int) else contents
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return path
