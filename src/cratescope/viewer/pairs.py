"""Which units of two sites are most alike: every pair is compared, block by block, and of each unit the best are kept.

Units are columns of length 1, so that the product of two is their likeness: the cosine of what they write, or the
correlation of what they do on the same tokens. No block holds more than `BLOCK` x `BLOCK` pairs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cratescope.files import atomic_path

BLOCK = 1024
KEPT = 10
"""Of each unit."""
Columns = Callable[[slice], Float32[np.ndarray, "t m"]]
"""Gives some columns, each of length 1, or 0 where a unit is constant."""


@dataclass(frozen=True, eq=False)
class Best:
    """The most alike units of another site, the best first: their rows (n, KEPT), -1 where there is none, and values.

    n_tokens: what correlations were measured on; 0 of cosines.
    """

    row: Int[np.ndarray, "n k"]
    value: Float[np.ndarray, "n k"]
    n_tokens: int


class _Found:
    """The best so far of n units."""

    def __init__(self, n: int) -> None:
        self.row = np.full((n, KEPT), -1, dtype=np.int32)
        self.value = np.full((n, KEPT), -np.inf, dtype=np.float32)

    def see(self, units: slice, values: Float32[np.ndarray, "m k"], first: int) -> None:
        """The likeness of some units to others, which begin at row `first`."""
        rows = np.broadcast_to(np.arange(first, first + values.shape[1], dtype=np.int32), values.shape)
        every = np.concatenate([self.value[units], values], 1)
        best = np.argpartition(-every, KEPT - 1, axis=1)[:, :KEPT]
        self.value[units] = np.take_along_axis(every, best, 1)
        self.row[units] = np.take_along_axis(np.concatenate([self.row[units], rows], 1), best, 1)

    def best(self, n_tokens: int) -> Best:
        order = np.argsort(-self.value, axis=1, kind="stable")
        row, value = (np.take_along_axis(one, order, 1) for one in (self.row, self.value))
        known = value > 0
        return Best(np.where(known, row, -1), np.where(known, value, 0.0).astype(np.float32), n_tokens)


def compare(
    one: Columns, n: int, other: Columns, m: int, same: bool, n_tokens: int, done: Callable[[float], None]
) -> tuple[Best, Best]:
    """The best among m units for each of n, and the other way round.

    same: both are the same units, of which none is its own neighbour. done: is told the share that is done.
    """
    found, back = _Found(n), _Found(m)
    for start in range(0, n, BLOCK):
        mine = slice(start, min(start + BLOCK, n))
        left = one(mine).T
        for first in range(0, m, BLOCK):
            theirs = slice(first, min(first + BLOCK, m))
            values = left @ other(theirs)
            if same and first == start:
                np.fill_diagonal(values, -np.inf)
            found.see(mine, values, first)
            if not same:
                back.see(theirs, values.T, start)
        done(mine.stop / n)
    best = found.best(n_tokens)
    return best, best if same else back.best(n_tokens)


def write_best(path: Path, found: Best, identity: Mapping[str, Any]) -> None:
    """Keep what was found, unless the folder cannot be written to."""
    about = {"identity": json.dumps(identity, sort_keys=True), "n_tokens": str(found.n_tokens)}
    tensors = {"row": np.ascontiguousarray(found.row), "value": np.ascontiguousarray(found.value)}
    with contextlib.suppress(OSError), atomic_path(path) as temporary:
        save_file(tensors, temporary, about)


def read_best(path: Path, identity: Mapping[str, Any], n: int) -> Best | None:
    """What was found before, if it is of the same units; None for a damaged file too, which is then made again."""
    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError), safe_open(path, "np") as file:
        about = file.metadata() or {}
        row, value = file.get_tensor("row"), file.get_tensor("value")
        if about.get("identity") == json.dumps(identity, sort_keys=True) and row.shape == value.shape == (n, KEPT):
            return Best(row, value, int(about["n_tokens"]))
    return None
