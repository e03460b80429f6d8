"""The figure of the frontier: what sparse and well explained neurons cost in loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cratescope.report.figures import COLOURS, MARKERS, add_legend, arm_places, make_grid
from cratescope.results.compare import Quantity
from cratescope.results.estimates import finite
from cratescope.results.runs import Results

BEFORE = Quantity("uniform", "pearson", "shuffled")
"""The primary measure before the present one (docs/evaluation.md), shown beside it where it was scored."""
DENSITY, LOSS = "active codes, % of neurons", "loss, nats per token"


@dataclass(frozen=True)
class Point:
    """One model, at the end of its training or at a milestone: numbers by the names of the axes."""

    item: Results
    numbers: dict[str, float | None]

    @property
    def line(self) -> tuple[Any, ...]:
        """What the milestones of one training share."""
        return self.item.arm.size, self.item.side, self.item.arm.seed

    @property
    def order(self) -> tuple[Any, ...]:
        return *map(str, self.line), self.item.arm.tokens_trained or 0


def frontier_figures(results: Sequence[Results], primary: Quantity) -> Iterator[tuple[str, Figure]]:
    """The report's figure by its name, if at least two trained models can be placed."""
    quantities = list(dict.fromkeys((primary, BEFORE)))
    points = [_point(item, quantities, results) for item in results if not item.arm.untrained]
    points = [point for point in points if None not in (point.numbers[DENSITY], point.numbers[LOSS])]
    if len(points) > 1:
        yield "frontier", frontier_figure(sorted(points, key=lambda point: point.order), quantities)


def _point(item: Results, quantities: Sequence[Quantity], results: Sequence[Results]) -> Point:
    """Density is the mean over layers of the neurons collected; features are charged with the loss they leave."""
    rows = item.dictionary.quality if item.dictionary else []
    losses = [row["loss_replaced"] for row in rows] if item.features else [item.evaluation["loss"]]
    densities = [np.mean(found) for layer in item.scores.layers if (found := item.densities(layer))]
    numbers = {
        DENSITY: 100 * float(np.mean(densities)) if densities else None,
        LOSS: float(np.mean(losses)) if losses and None not in map(finite, losses) else None,
    }
    means = {_axis(quantity): quantity.mean(item, results).mean for quantity in quantities}
    return Point(item, numbers | {name: None if mean is None else 100 * mean for name, mean in means.items()})


def _axis(quantity: Quantity) -> str:
    return f"{quantity.name}, × 100".replace(", gain", ",\ngain")  # two lines beside a small panel


def frontier_figure(points: Sequence[Point], quantities: Sequence[Quantity]) -> Figure:
    """Loss against density, then each score against both; thin lines lead from milestones to the end of a training."""
    scored = [name for name in map(_axis, quantities) if any(point.numbers[name] is not None for point in points)]
    axes_of = [(DENSITY, LOSS), *((x, name) for name in scored for x in (DENSITY, LOSS))]
    panels = [(size, *pair) for size in dict.fromkeys(point.item.arm.size for point in points) for pair in axes_of]
    figure, grid = make_grid(len(panels), 3, lambda rows: 3 * rows + 0.6)
    looks = _looks([point.item for point in points])
    for axes, (size, x, y) in zip(grid, panels, strict=True):
        here = [point for point in points if point.item.arm.size == size]
        for _, course in groupby(here, key=lambda point: point.line):
            _trail(axes, list(course), x, y, looks)
        axes.set(title=size.upper(), xlabel=x, ylabel=y)
        if x == DENSITY:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
    add_legend(figure, *grid)
    return figure


def _looks(items: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """By side: the arm's hue, and a marker of its own among the arms of this hue; features are hollow."""
    places, looks = arm_places(items), {}
    for item in items:
        hue, turn = places[item.arm.name], list(places).index(item.arm.name) // len(COLOURS)
        colour, fill = COLOURS[hue], "none" if item.features else COLOURS[hue]
        marker = MARKERS[turn % len(MARKERS)]
        looks[item.side] = {"color": colour, "marker": marker, "markerfacecolor": fill, "label": item.title}
    return looks


def _trail(axes: Any, course: Sequence[Point], x: str, y: str, looks: dict[str, dict[str, Any]]) -> None:
    placed = [(point.numbers[x], point.numbers[y]) for point in course if point.numbers[y] is not None]
    if placed:
        look = looks[course[0].item.side]
        small: dict[str, Any] = {"label": None, "linewidth": 0.7, "markersize": 2.5, "alpha": 0.6}
        axes.plot(*zip(*placed, strict=True), **look | small, markevery=slice(0, -1))  # the end has a large one
        axes.plot(*placed[-1], **look, linestyle="none", markersize=6.5)
