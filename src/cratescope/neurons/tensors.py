"""Files of tensors that detect their own damage: safetensors with a checksum of the tensors in the header."""

from __future__ import annotations

import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cratescope.files import atomic_path

LAYOUT = 1
"""Of the tensors that stages write: raise it when shapes or meaning change. Files of before then count as damaged."""


def save_tensors(path: Path, tensors: dict[str, Tensor], first: bool = False) -> None:
    """Write `path` atomically. first: keep a file that another process has put there in the meantime."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(path, first) as temporary:
        save_file(tensors, temporary, {"crc32": _checksum(tensors)})


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """Read what `save_tensors` wrote; None if the file is missing or damaged. A damaged file is deleted."""
    try:
        with safe_open(path, "pt") as file:
            # Copies, because the file's own tensors would keep all of it in memory while any row is in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
            whole = (file.metadata() or {}).get("crc32") == _checksum(tensors)
    except FileNotFoundError:
        return None
    except SafetensorError:
        whole = False
    if not whole:
        path.unlink(missing_ok=True)
        return None
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = LAYOUT
    for name in sorted(tensors):
        total = zlib.crc32(f"{name} {tuple(tensors[name].shape)}".encode(), total)
        total = zlib.crc32(tensors[name].numpy().data, total)
    return f"{total:08x}"
