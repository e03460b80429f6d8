"""The figures of steering: success against KL, and the curves of one unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from cratescope.neurons.curves import Point
from cratescope.report.figures import COLOURS, INK, WIDTH, Style, add_legend, make_grid, save_svg, styled, styles
from cratescope.results.estimates import of_model
from cratescope.results.runs import NEURONS, Results, one_per_run
from cratescope.results.steering import AIMS, Steering, Swept

CURVE = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
"""Nats per token that the figure of steering reads success off at."""


def steering_figures(results: Sequence[Results], swept: Sequence[Swept]) -> Iterator[tuple[str, Figure]]:
    """The report's figure by its name, if there is one."""
    if swept:
        yield "steering", success_figure(results, swept)


def success_figure(results: Sequence[Results], swept: Sequence[Swept]) -> Figure:
    """Success against KL, one panel per kind of unit, with the interval of 95 %; dashed: random directions.

    A line ends where half of its units have got no further.
    """
    panels, looks = list(dict.fromkeys(panel_of(item, found) for item, found in swept)), styles(one_per_run(results))
    figure, grid = make_grid(len(panels), min(3, len(panels)), lambda rows: 2.8 * rows + 0.5, sharex=True, sharey=True)
    for axes, panel in zip(grid, panels, strict=True):
        for item, found in swept:
            if panel_of(item, found) == panel:
                _success_lines(axes, found, looks[item.label], item.run.name)
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.set(xlim=(CURVE[0], CURVE[-1]), xscale="log")  # also where no unit gets as far
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(title=panel, xlabel="KL(steered || plain), nats per token")
        axes.tick_params(labelbottom=True)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("rise of the targets' probability × 100")
    add_legend(figure, *grid)
    return figure


def panel_of(item: Results, found: Steering) -> str:
    """`neurons`, or the autoencoder and how its edits are written back."""
    return NEURONS if found.site == item.arm.site else found.title


def _success_lines(axes: Any, found: Steering, style: Style, label: str) -> None:
    kls = [kl for kl in CURVE if found.reached(kl) >= 0.5]
    own = [of_model(found.success(kl)) for kl in kls]
    random = [of_model(found.success(kl, kind="random", tokens=AIMS), bounds=False) for kl in kls]
    for means, line, name in ((own, style.line, label), (random, (0, (1, 1.5)), None)):
        shown = [100 * (one.mean or 0) for one in means]
        axes.plot(kls, shown, color=style.colour, linestyle=line, linewidth=1.4 if name else 1, label=name)
    bounds = [
        (kl, 100 * one.low, 100 * one.high)
        for kl, one in zip(kls, own, strict=True)
        if one.low is not None and one.high is not None
    ]
    if bounds:
        axes.fill_between(*zip(*bounds, strict=True), color=style.colour, alpha=0.15, linewidth=0)


UNIT_PANELS: dict[str, Callable[[Point], float]] = {
    "KL(steered || plain), nats per token": lambda one: one.kl,
    "change of the loss, nats per token": lambda one: one.loss,
    "rise of the targets' logits": lambda one: one.logit,
    "rise of the targets' probability × 100": lambda one: 100 * (one.mass - one.mass_plain),
    "targets in written text, %": lambda one: 100 * one.rate,
    "loss of written text without edit, nats": lambda one: one.nats,
}
KIND_LINES = {
    "own": ("-", COLOURS[0]),
    "random": (":", INK),
    "flipped": ("--", COLOURS[1]),
    "other": ("-.", COLOURS[2]),
}


def draw_unit(points: Sequence[Point], path: Path) -> None:
    """Draw the curves of one unit over strengths, with its controls, as SVG."""
    with styled():
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        grid = list(figure.subplots(2, 3, sharex=True).ravel())
        for axes, (title, value) in zip(grid, UNIT_PANELS.items(), strict=True):
            for kind, (line, colour) in KIND_LINES.items():
                if found := [(one.strength, value(one)) for one in points if one.kind == kind]:
                    look: Any = {"linestyle": line, "color": colour, "marker": "o", "markersize": 3, "label": kind}
                    axes.plot(*zip(*found, strict=True), **look)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda place, _: f"{place:g}")
            axes.set(title=title, xlabel="multiples of the maximum")
        add_legend(figure, *grid)
        save_svg(figure, path)
