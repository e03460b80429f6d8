"""All units of one site of a run as columns: what the page lists, sorts, filters and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from cratescope.viewer.opened import NUMBERS, Measure, Opened, OpenedSite
from cratescope.viewer.values import numbers

TITLES = {
    "density": "density",
    "mean": "mean",
    "maximum": "maximum",
    "kurtosis": "kurtosis",
    "skewness": "skewness",
}
OfLayer = Callable[[int], Float[np.ndarray, " n"]]


def table(opened: Opened, site: OpenedSite) -> dict[str, Any]:
    """One entry per unit in every list, sorted by layer and index."""
    layers = site.layers
    units = [site.units(layer) for layer in layers]
    explained = [text for layer in layers for text in site.texts(layer)]
    columns = [
        {"key": key, "title": title, "kind": "number", "unit": "", "values": numbers(_joined(site, of_layer))}
        for key, title, of_layer in _numbers(site)
    ]
    flags = {"dead": [dead for one in units for dead in one.dead.tolist()], "explained": [*map(bool, explained)]}
    columns += [{"key": key, "title": key, "kind": "flag", "unit": "", "values": flags[key]} for key in flags]
    return {
        "run": opened.name,
        "site": site.name,
        "layer": [layer for layer, one in zip(layers, units, strict=True) for _ in range(len(one))],
        "index": [index for one in units for index in one.index.tolist()],
        "columns": columns,
        "text": explained,
    }


def keys(measures: list[Measure]) -> Iterator[tuple[str, Measure]]:
    """The key of each measure's column: `score` is that of the first."""
    for place, measure in enumerate(measures):
        yield (f" {measure.source}" if place else ""), measure


def title(measure: Measure) -> str:
    """A measure as a reader knows it, such as "uniform pearson, terms"."""
    return f"{measure.protocol} {measure.name}, {measure.source}"


def _numbers(site: OpenedSite) -> Iterator[tuple[str, str, OfLayer]]:
    for ending, measure in keys(site.measures):
        yield f"score{ending}", f"score ({title(measure)})", lambda layer, by=measure: site.scored(by, layer).own
        gain = f"gain over another's explanation ({title(measure)})"
        yield f"gain{ending}", gain, lambda layer, by=measure: site.scored(by, layer).gain
    for name in NUMBERS:
        yield name, TITLES[name], lambda layer, name=name: site.units(layer).numbers[name]


def _joined(site: OpenedSite, of_layer: OfLayer) -> Float[np.ndarray, " n"]:
    return np.concatenate([of_layer(layer) for layer in site.layers])
