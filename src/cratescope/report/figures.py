"""The figures of a report: one hue per arm, one line style per run; the same inputs give the same bytes.

Where runs were scored at several sites, neurons and features differ by marker, and their distributions have panels of
their own.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from cratescope.results.runs import NEURONS, Results, one_per_run, protocols

# Okabe and Ito's, distinguishable with every common kind of colour vision: CRATE blue, GPT-2 vermilion, others in turn.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
INK = "#1c2024"
WIDTH = 9.6

# The page replaces these colours by CSS variables, so that an inline figure follows the light or dark scheme.
_ON_PAGE = {INK: "currentColor"} | {colour: f"var(--arm{place})" for place, colour in enumerate(COLOURS)}
_LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
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
    """A run's look in every figure: the arm's hue, with a line style and marker of its own.

    of_site: the marker where the sites of a run share a panel; the run's own if there is one site.
    """

    colour: str
    line: str
    marker: str
    of_site: str


def arm_places(results: Sequence[Results]) -> dict[str, int]:
    """Assign COLOURS to arms; with more arms than colours, some share one."""
    names = list(dict.fromkeys([*USUAL, *(item.arm.name for item in results)]))
    return {name: place % len(COLOURS) for place, name in enumerate(names)}


def styles(results: Sequence[Results]) -> dict[str, Style]:
    """A style for every label; runs of one arm differ in line and marker."""
    found, hues, units = {}, arm_places(results), _units(results)
    for item in results:
        runs = [other.run.root for other in one_per_run(results) if other.arm.name == item.arm.name]
        turn = runs.index(item.run.root)
        places = turn, units.index(item.units) if len(units) > 1 else turn
        look = _LINES[turn % len(_LINES)], *(MARKERS[place % len(MARKERS)] for place in places)
        found[item.label] = Style(COLOURS[hues[item.arm.name]], *look)
    return found


def _units(results: Sequence[Results]) -> list[str]:
    """What was scored: neurons, then other sites in the order of the runs."""
    return sorted({item.units: None for item in results}, key=lambda name: name != NEURONS)


def _sizes(results: Sequence[Results]) -> dict[str, int]:
    """Every size with its number of layers, smallest first; runs of one size share a panel."""
    depths = {item.arm.size: 0 for item in results}
    for item in results:
        depths[item.arm.size] = max(depths[item.arm.size], item.manifest["n_layer"])
    return dict(sorted(depths.items(), key=lambda entry: (entry[1], entry[0])))


def draw_figures(figures: Iterable[tuple[str, Figure]], folder: Path) -> dict[str, str]:
    """Write figures to `folder` as SVG and PNG; return the SVGs for the page by name.

    Each is to be drawn only when it is asked for, since the style is set while this goes on.
    """
    page = {}
    with styled():
        for name, figure in figures:
            with atomic_path(folder / f"{name}.png") as path:
                figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
            figure.set_layout_engine("none")  # keep the layout just made, for both files alike
            save_svg(figure, folder / f"{name}.svg")
            page[name] = inline(folder / f"{name}.svg")
    return page


def styled() -> contextlib.AbstractContextManager[None]:
    """While open, figures get the style of reports."""
    return matplotlib.rc_context(_STYLE)


def save_svg(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", dpi=150, metadata=_NO_METADATA)


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


def figures_of(results: Sequence[Results]) -> Iterator[tuple[str, Figure]]:
    """Every figure of runs, by name."""
    yield "loss", loss_figure(results)
    yield "layers", layer_figure(results)
    for name in protocols(results):
        yield f"histogram-{name}", histogram_figure(results, name)
    yield "density", density_figure(results)
    yield "histogram-density", density_histogram_figure(results)
    if any(found.quality for item in results for found in item.dictionaries):
        yield "dictionaries", dictionary_figure(results)


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
    add_legend(figure, axes)
    return figure


def layer_figure(results: Sequence[Results]) -> Figure:
    """Mean score of every layer (filled, plus or minus one standard error) and its shuffled control (hollow), x100."""
    panels = [(size, depth, name) for size, depth in _sizes(results).items() for name in protocols(results)]
    figure, grid = make_grid(len(panels), min(3, len(protocols(results))), lambda rows: 2.8 * rows + 0.5)
    for axes, (size, depth, name) in zip(grid, panels, strict=True):
        for item, style, dodge in _side_by_side(results, size):
            _layer_lines(axes, item, name, style, dodge)
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.set(title=f"{size.upper()}, {name}", xlabel="layer", xlim=(-0.5, depth - 0.5))
        axes.set_xticks(range(depth))
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("score × 100")
    add_legend(figure, *grid)
    return figure


def make_grid(n: int, columns: int, height: Callable[[int], float], **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure with `n` panels in rows of `columns`; `height` gives its inches from the number of rows."""
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(WIDTH, height(rows)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for axes in grid[n:]:
        axes.set_visible(False)
    return figure, list(grid[:n])


def _layer_lines(axes: Any, item: Results, protocol: str, style: Style, dodge: float) -> None:
    for control, fill in ((OWN, style.colour), (SHUFFLED, "none")):
        own = control == OWN
        layers = sorted(item.scores.columns(protocol))
        found = {layer: item.scores.mean(protocol, None, control, layer=layer) for layer in layers}
        means = {layer: mean for layer, mean in found.items() if mean.mean is not None}
        axes.errorbar(
            [layer + dodge for layer in means],
            [100 * (mean.mean or 0) for mean in means.values()],
            yerr=[100 * (mean.standard_error or 0) for mean in means.values()],
            color=style.colour,
            marker=style.of_site,
            markerfacecolor=fill,
            markersize=5.5 if own else 4.5,
            linestyle=style.line,
            linewidth=1.4 if own else 0.6,
            capsize=2.5,
            elinewidth=1,
            label=item.label if own else None,
        )


def histogram_figure(results: Sequence[Results], protocol: str) -> Figure:
    """Scores of a protocol, one panel per site, size and layer with its runs overlaid; dashed lines are the means."""
    everything = [value for item in results for layer in item.scores.layers for value in _values(item, protocol, layer)]
    low, high = min(everything, default=-1.0), max(everything, default=1.0)
    bins = np.linspace(math.floor(low * 10) / 10, math.ceil(high * 10) / 10 + 1e-9, 25)
    return _histogram_panels(results, lambda item, layer: _values(item, protocol, layer), bins, "score")


def density_histogram_figure(results: Sequence[Results]) -> Figure:
    """How often live neurons are active, one panel per site, size and layer; dashed lines are the means."""
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
    units = _units(results)
    places = [(size, layer) for size, depth in _sizes(results).items() for layer in range(depth)]
    panels = [(name, *place) for name in units for place in places]
    # Sites one below the other, where a row holds all layers.
    columns = min(4, len(places))
    figure, grid = make_grid(len(panels), columns, lambda rows: 2.5 * rows + 0.4, sharex=True, sharey=True)
    for axes, (name, size, layer) in zip(grid, panels, strict=True):
        for item, style, _ in _side_by_side(results, size, name):
            _histogram(axes, np.array(values(item, layer)), bins, style, item.run.name)
        axes.set(title=f"{size.upper()}, layer {layer}{_of(name, units)}", xlabel=label)
        axes.tick_params(labelbottom=True)
        if (name, size, layer) == (name, *places[0]):
            axes.set_ylabel("% of neurons" if name == NEURONS else "% of features")
    add_legend(figure, *grid)
    return figure


def _of(name: str, units: Sequence[str]) -> str:
    """The end of a panel's title: what is scored, where that is not the same everywhere."""
    return f", {name}" if len(units) > 1 else ""


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
    sizes, units = _sizes(results), _units(results)
    figure = Figure(figsize=(WIDTH, 3 * len(units) + 0.4), layout="constrained")
    ratios = list(sizes.values())
    grid = figure.subplots(len(units), len(sizes), squeeze=False, sharex="col", sharey=True, width_ratios=ratios)
    for row, name in zip(grid, units, strict=True):
        for axes, (size, depth) in zip(row, sizes.items(), strict=True):
            for item, style, dodge in _side_by_side(results, size, name):
                _density_columns(axes, item, style, dodge)
            axes.set_yscale("log")
            axes.set(title=f"{size.upper()}{_of(name, units)}", xlabel="layer", xlim=(-0.5, depth - 0.5))
            axes.set_xticks(range(depth))
        row[0].set_ylabel("% of tokens with a non-zero activation")
    grid[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    grid[0, 0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    grid[0, 0].yaxis.set_minor_formatter(NullFormatter())
    add_legend(figure, *grid.ravel())
    return figure


def _density_columns(axes: Any, item: Results, style: Style, dodge: float) -> None:
    for layer in item.scores.layers:
        if len(alive := _alive(item, layer)):
            label = item.run.name if layer == item.scores.layers[0] else None
            _density_column(axes, np.array(alive), layer + dodge, style, label)


def _density_column(axes: Any, alive: np.ndarray, place: float, style: Style, label: str | None) -> None:
    jitter = (np.arange(len(alive)) * 0.618034 % 1 - 0.5) * 0.08  # the golden ratio spreads any number of dots evenly
    dots: dict[str, Any] = {"s": 5, "alpha": 0.5, "linewidths": 0, "rasterized": True}
    axes.scatter(place + jitter, alive, color=style.colour, **dots)
    low, middle, high = np.percentile(alive, [25, 50, 75])
    axes.plot([place, place], [low, high], color=style.colour, linewidth=3, solid_capstyle="butt")
    look: dict[str, Any] = {"markersize": 8, "markeredgecolor": "white", "linestyle": "none"}
    axes.plot([place], [middle], marker=style.marker, color=style.colour, label=label, **look)


def dictionary_figure(results: Sequence[Results]) -> Figure:
    """How often live features of every measured dictionary are active, one panel per size and layer."""
    found = [
        (item, dictionary.site, row)
        for item in one_per_run(results)
        for dictionary in item.dictionaries
        for row in dictionary.quality
    ]
    sites, looks = list(dict.fromkeys(site for _, site, _ in found)), styles(one_per_run(results))
    panels = sorted({(item.arm.size, row["layer"]) for item, _, row in found})
    figure, grid = make_grid(len(panels), min(4, len(panels)), lambda rows: 2.5 * rows + 0.4, sharex=True, sharey=True)
    for axes, panel in zip(grid, panels, strict=True):
        for item, site, row in found:
            if (item.arm.size, row["layer"]) == panel:
                line = _LINES[sites.index(site) % len(_LINES)]
                name = f"{item.run.name} · {site}"
                _density_line(axes, row["density"], color=looks[item.label].colour, linestyle=line, label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(title=f"{panel[0].upper()}, layer {panel[1]}", xlabel="% of tokens with a non-zero code")
        axes.tick_params(labelbottom=True)
    grid[0].set_ylabel("% of features per decade")
    add_legend(figure, *grid)
    return figure


def _density_line(axes: Any, density: dict[str, list[float]], **look: Any) -> None:
    edges, counts = (np.array(density[name], dtype=float) for name in ("edges", "counts"))
    share = 100 * counts / max(counts.sum(), 1) / np.diff(edges)
    axes.stairs(share, 100 * 10**edges, linewidth=1.4, **look)


def _side_by_side(
    results: Sequence[Results], size: str, units: str | None = None
) -> Iterator[tuple[Results, Style, float]]:
    """Those of one size, or those at one site of these, with a shift along the layers that keeps them apart."""
    chosen = [(item, style) for item, style in _styled(results) if item.arm.size == size]
    chosen = [(item, style) for item, style in chosen if units in (None, item.units)]
    step = min(0.14, 0.7 / max(len(chosen), 1))
    for place, (item, style) in enumerate(chosen):
        yield item, style, (place - (len(chosen) - 1) / 2) * step


def _styled(results: Sequence[Results]) -> Iterator[tuple[Results, Style]]:
    found = styles(results)
    for item in results:
        yield item, found[item.label]


def add_legend(figure: Figure, *panels: Any) -> None:
    """One legend above the panels that names everything any of them shows, in as many columns as its names leave."""
    named = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if entries := {label: handle for handle, label in named}:
        columns = int(WIDTH / (0.7 + 0.07 * max(map(len, entries))))
        columns = min(4, max(columns, 1), len(entries))
        figure.legend(list(entries.values()), list(entries), loc="outside upper left", ncols=columns)
