"""`cratescope steer`: text steered beside plain, or a sweep; of one unit with its numbers as CSV and its figure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cratescope.errors import UserError
from cratescope.neurons import continuations
from cratescope.neurons.config import SteerConfig
from cratescope.neurons.continuations import Continuations
from cratescope.neurons.curves import Point
from cratescope.neurons.sweep import curves_folder, sweep, sweep_one
from cratescope.report.curves import draw_unit
from cratescope.results.tables import write_csv
from cratescope.run import Run
from cratescope.text.tokenizer import token_strings


@dataclass(frozen=True)
class UnitCurves:
    """The curves of one unit, and the texts of its targets."""

    points: Sequence[Point]
    targets: Sequence[str]
    files: tuple[Path, ...]


def steer(config: SteerConfig) -> Continuations | UnitCurves | Path:
    """Do what was asked for: with `sweep` measure curves, else write on after a prompt. Errors as of both."""
    if not config.sweep:
        return continuations.steer(config)
    if config.edit or config.json:
        what = "--edit" if config.edit else "--json"
        raise UserError(f"{what}: a sweep makes edits and files of its own; leave it out, or name a --neuron")
    return _sweep_unit(config) if config.neuron else sweep(config)


def _sweep_unit(config: SteerConfig) -> UnitCurves:
    named = re.fullmatch(r"(\d{1,9}):(\d{1,9})", config.neuron or "", re.ASCII)
    if named is None:
        raise UserError(
            f"--neuron {config.neuron!r:.60}: a sweep takes LAYER:NEURON such as 1:37, and --site for others"
        )
    layer, index = map(int, named.groups())
    points = sweep_one(config, layer, index)
    run = Run(config.run)
    table = curves_folder(config, points[0].neuron.site) / f"layer-{layer:02d}-unit-{index}.csv"
    figure = table.with_suffix(".svg")
    write_csv(table, lambda: [_cells(point) for point in points])
    draw_unit(points, figure)
    return UnitCurves(points, token_strings(run.tokenizer, points[0].targets), (table, figure))


def _cells(point: Point) -> dict[str, object]:
    """A point as a row, its tokens in one cell each."""
    row = vars(point.neuron) | {name: value for name, value in vars(point).items() if name != "neuron"}
    return {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in row.items()}
