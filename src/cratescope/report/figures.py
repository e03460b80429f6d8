"""The figures of a report: one hue per arm, one line style per run; the same inputs give the same bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cratescope.explain.controls import OWN, SHUFFLED
from cratescope.files import atomic_path
from cratescope.report.text import count
from cratescope.results.compare import USUAL
from cratescope.results.estimates import finite
from cratescope.results.runs import Results, one_per_run, protocols

# Okabe and Ito's, distinguishable with every common kind of colour vision: CRATE blue, GPT-2 vermilion, others in turn.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
INK = "#1c2024"
WIDTH = 9.6

# The page replaces these colours by CSS variables, so that an inline figure follows the light or dark scheme.
_ON_PAGE = {INK: "currentColor"} | {colour: f"var(--arm{place})" for place, colour in enumerate(COLOURS)}
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cratescope",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a run called a$b is not a formula
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "savefig.transparent": False,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "grid.color"), INK),
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), INK),
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Of an SVG: otherwise matplotlib writes the time and an address into the file."""


@dataclass(frozen=True)
class Style:
    """A run's look in every figure: the arm's hue, with a line style and marker of its own."""

    colour: str
    line: str
    marker: str
    dodge: float


def arm_places(results: Sequence[Results]) -> dict[str, int]:
    """Assign COLOURS to arms; with more arms than colours, some share one."""
    names = list(dict.fromkeys([*USUAL, *(item.arm.name for item in results)]))
    return {name: place % len(COLOURS) for place, name in enumerate(names)}


def styles(results: Sequence[Results]) -> dict[str, Style]:
    """A style for every label; runs of one arm differ in line and marker, runs of one size are drawn side by side."""
    seen: dict[str, int] = {}
    found, hues = {}, arm_places(results)
    for item in results:
        turn = seen[item.arm.name] = seen.get(item.arm.name, -1) + 1
        beside = [other.label for other in results if other.arm.size == item.arm.size]
        dodge = (beside.index(item.label) - (len(beside) - 1) / 2) * min(0.14, 0.7 / len(beside))
        marker = _MARKERS[turn % len(_MARKERS)]
        found[item.label] = Style(COLOURS[hues[item.arm.name]], _LINES[turn % len(_LINES)], marker, dodge)
    return found


def _sizes(results: Sequence[Results]) -> dict[str, int]:
    """Every size with its number of layers, smallest first; runs of one size share a panel."""
    depths = {item.arm.size: 0 for item in results}
    for item in results:
        depths[item.arm.size] = max(depths[item.arm.size], item.manifest["n_layer"])
    return dict(sorted(depths.items(), key=lambda entry: (entry[1], entry[0])))


def draw_figures(results: Sequence[Results], folder: Path) -> dict[str, str]:
    """Write every figure to `folder` as SVG and PNG; return the SVGs for the page by name."""
    page = {}
    with matplotlib.rc_context(_STYLE):
        for name, figure in _figures(results):
            with atomic_path(folder / f"{name}.png") as path:
                figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
            figure.set_layout_engine("none")  # keep the layout just made, for both files alike
            with atomic_path(folder / f"{name}.svg") as path:
                figure.savefig(path, format="svg", dpi=150, metadata=_NO_METADATA)
            page[name] = inline(folder / f"{name}.svg")
    return page


def inline(path: Path) -> str:
    """The <svg> element of a file for the page: no prologue, no background, colours that follow the scheme."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*" width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _ON_PAGE.items():
        svg = svg.replace(colour, variable)
    # Group ids repeat between figures and nothing refers to them.
    return re.sub(r'<g id="[a-zA-Z0-9]+_\d+">', "<g>", svg)


def _figures(results: Sequence[Results]) -> Iterator[tuple[str, Figure]]:
    yield "loss", loss_figure(results)
    yield "layers", layer_figure(results)
    for name in protocols(results):
        yield f"histogram-{name}", histogram_figure(results, name)
    yield "density", density_figure(results)
    yield "histogram-density", density_histogram_figure(results)


def loss_figure(results: Sequence[Results]) -> Figure:
    """Train (thin) and validation loss (thick) in nats against training tokens, with the unigram entropy dashed."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for item, style in _styled(one_per_run(results)):
        train = [(row["tokens"], row["loss"]) for row in item.metrics if finite(row.get("loss")) is not None]
        checks = [row for row in item.metrics if finite(row.get("validation_loss")) is not None]
        validation = [(row["tokens"], row["validation_loss"]) for row in checks]
        if train:
            axes.plot(*zip(*train, strict=True), color=style.colour, linewidth=0.8, alpha=0.35)
        if validation:
            look: dict[str, Any] = {"marker": style.marker, "markersize": 4, "linestyle": style.line, "linewidth": 1.6}
            axes.plot(*zip(*validation, strict=True), color=style.colour, label=item.run.name, **look)
    entropies = [entropy for item in results if (entropy := finite(item.evaluation["unigram_entropy"])) is not None]
    for number, entropy in enumerate(sorted({round(entropy, 4) for entropy in entropies})):
        label = "unigram entropy" if number == 0 else None
        axes.axhline(entropy, color=INK, linestyle=(0, (5, 4)), linewidth=1, label=label)
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    _legend(figure, axes)
    return figure


def layer_figure(results: Sequence[Results]) -> Figure:
    """Mean score of every layer (filled, plus or minus one standard error) and its shuffled control (hollow), x100."""
    panels = [(size, depth, name) for size, depth in _sizes(results).items() for name in protocols(results)]
    figure, grid = _grid(len(panels), min(3, len(protocols(results))), lambda rows: 2.8 * rows + 0.5)
    for axes, (size, depth, name) in zip(grid, panels, strict=True):
        for item, style in _styled(results):
            if item.arm.size == size:
                _layer_lines(axes, item, name, style)
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.set(title=f"{size.upper()}, {name}", xlabel="layer", xlim=(-0.5, depth - 0.5))
        axes.set_xticks(range(depth))
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("score × 100")
    _legend(figure, *grid)
    return figure


def _grid(n: int, columns: int, height: Callable[[int], float], **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure with `n` panels in rows of `columns`; `height` gives its inches from the number of rows."""
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(WIDTH, height(rows)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for axes in grid[n:]:
        axes.set_visible(False)
    return figure, list(grid[:n])


def _layer_lines(axes: Any, item: Results, protocol: str, style: Style) -> None:
    for control, fill in ((OWN, style.colour), (SHUFFLED, "none")):
        own = control == OWN
        layers = sorted(item.scores.columns(protocol))
        found = {layer: item.scores.mean(protocol, None, control, layer=layer) for layer in layers}
        means = {layer: mean for layer, mean in found.items() if mean.mean is not None}
        axes.errorbar(
            [layer + style.dodge for layer in means],
            [100 * (mean.mean or 0) for mean in means.values()],
            yerr=[100 * (mean.standard_error or 0) for mean in means.values()],
            color=style.colour,
            marker=style.marker,
            markerfacecolor=fill,
            markersize=5.5 if own else 4.5,
            linestyle=style.line,
            linewidth=1.4 if own else 0.6,
            capsize=2.5,
            elinewidth=1,
            label=item.label if own else None,
        )


def histogram_figure(results: Sequence[Results], protocol: str) -> Figure:
    """Neuron scores of a protocol, one panel per size and layer with its runs overlaid; dashed lines are the means."""
    everything = [value for item in results for layer in item.scores.layers for value in _values(item, protocol, layer)]
    low, high = min(everything, default=-1.0), max(everything, default=1.0)
    bins = np.linspace(math.floor(low * 10) / 10, math.ceil(high * 10) / 10 + 1e-9, 25)
    return _histogram_panels(results, lambda item, layer: _values(item, protocol, layer), bins, "score")


def density_histogram_figure(results: Sequence[Results]) -> Figure:
    """How often live neurons are active, one panel per size and layer; dashed lines are the means."""
    everything = [value for item in results for layer in item.scores.layers for value in _alive(item, layer)]
    low = math.floor(math.log10(min(everything, default=1.0)))
    bins = np.logspace(low, 2, 8 * (2 - low) + 1)
    figure = _histogram_panels(results, _alive, bins, "% of tokens with a non-zero activation")
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _histogram_panels(
    results: Sequence[Results], values: Callable[[Results, int], Sequence[float]], bins: np.ndarray, label: str
) -> Figure:
    panels = [(size, layer) for size, depth in _sizes(results).items() for layer in range(depth)]
    columns = min(4, len(panels))
    figure, grid = _grid(len(panels), columns, lambda rows: 2.5 * rows + 0.4, sharex=True, sharey=True)
    for axes, (size, layer) in zip(grid, panels, strict=True):
        for item, style in _styled(results):
            if item.arm.size == size:
                _histogram(axes, np.array(values(item, layer)), bins, style, item.label)
        axes.set(title=f"{size.upper()}, layer {layer}", xlabel=label)
        axes.tick_params(labelbottom=True)
    grid[0].set_ylabel("% of neurons")
    _legend(figure, *grid)
    return figure


def _alive(item: Results, layer: int) -> list[float]:
    """Percentage of tokens on which each live neuron is active."""
    return [100 * density for density in item.densities(layer) if density > 0]


def _values(item: Results, protocol: str, layer: int) -> list[float]:
    return [*item.scores.values(protocol).get(layer, {}).values()]


def _histogram(axes: Any, values: np.ndarray, bins: np.ndarray, style: Style, label: str) -> None:
    if not len(values):
        return
    share = np.full(len(values), 100 / len(values))
    axes.hist(values, bins, weights=share, color=style.colour, alpha=0.22, histtype="stepfilled")
    look: dict[str, Any] = {"histtype": "step", "linewidth": 1.2, "linestyle": style.line}
    axes.hist(values, bins, weights=share, color=style.colour, label=label, **look)
    axes.axvline(values.mean(), color=style.colour, linewidth=1, linestyle=(0, (4, 3)))


def density_figure(results: Sequence[Results]) -> Figure:
    """Fraction of tokens with a non-zero activation: one dot per neuron, with each layer's median and middle half."""
    sizes = _sizes(results)
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    grid = figure.subplots(1, len(sizes), squeeze=False, sharey=True, width_ratios=list(sizes.values()))[0]
    for axes, (size, depth) in zip(grid, sizes.items(), strict=True):
        for item, style in _styled(results):
            for layer in item.scores.layers if item.arm.size == size else ():
                alive = _alive(item, layer)
                if len(alive):
                    label = item.label if layer == item.scores.layers[0] else None
                    _density_column(axes, np.array(alive), layer + style.dodge, style, label)
        axes.set_yscale("log")
        axes.set(title=size.upper(), xlabel="layer", xlim=(-0.5, depth - 0.5))
        axes.set_xticks(range(depth))
    grid[0].set_ylabel("% of tokens with a non-zero activation")
    grid[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    grid[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    grid[0].yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, *grid)
    return figure


def _density_column(axes: Any, alive: np.ndarray, place: float, style: Style, label: str | None) -> None:
    jitter = (np.arange(len(alive)) * 0.618034 % 1 - 0.5) * 0.08  # the golden ratio spreads any number of dots evenly
    dots: dict[str, Any] = {"s": 5, "alpha": 0.5, "linewidths": 0, "rasterized": True}
    axes.scatter(place + jitter, alive, color=style.colour, **dots)
    low, middle, high = np.percentile(alive, [25, 50, 75])
    axes.plot([place, place], [low, high], color=style.colour, linewidth=3, solid_capstyle="butt")
    look: dict[str, Any] = {"markersize": 8, "markeredgecolor": "white", "linestyle": "none"}
    axes.plot([place], [middle], marker=style.marker, color=style.colour, label=label, **look)


def _styled(results: Sequence[Results]) -> Iterator[tuple[Results, Style]]:
    found = styles(results)
    for item in results:
        yield item, found[item.label]


def _legend(figure: Figure, *panels: Any) -> None:
    """One legend above the panels that names everything any of them shows."""
    named = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if entries := {label: handle for handle, label in named}:
        figure.legend(list(entries.values()), list(entries), loc="outside upper left", ncols=min(4, len(entries)))
