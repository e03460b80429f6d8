"""Reads and spoils the tables of explanations, simulations, judgements and scores."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cratescope.explain.explained import Explanation, Judgement, Simulation, explanations, judgements, simulations
from cratescope.neurons.kept import Kept
from cratescope.neurons.records import NeuronId
from cratescope.score.scores import Score, scores


def read_explanations(folder: Path) -> dict[NeuronId, Explanation]:
    return dict(explanations(folder).all())


def read_simulations(folder: Path) -> dict[NeuronId, Simulation]:
    return dict(simulations(folder).all())


def read_judgements(folder: Path) -> list[Judgement]:
    return [item for _, items in judgements(folder).all() for item in items]


def read_scores(folder: Path) -> list[Score]:
    return [score for _, items in scores(folder).all() for score in items]


def drop(kept: Kept[Any], layer: int, indices: Iterable[int]) -> None:
    """Make a layer's table as if some neurons were not done yet."""
    gone = {*indices}
    kept.replace(layer, [item for index, item in kept.read(layer).items() if index not in gone])


def change(kept: Kept[Any], layer: int, index: int, **changes: Any) -> None:
    """Give a neuron's item other values."""
    item = kept.read(layer, [index])[index]
    kept.write([dataclasses.replace(item, **changes)])


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over, without a trace in its size or its time of writing."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
