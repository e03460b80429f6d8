"""All units of one site of a run as columns: what the page lists, sorts, filters and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from cratescope.viewer.opened import EFFECTS, NUMBERS, Measure, Opened, OpenedSite
from cratescope.viewer.values import numbers

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
    """Key, title and values of every column of numbers."""
    for ending, measure in keys(site.measures):
        yield f"score{ending}", f"score ({title(measure)})", partial(_own, site, measure)
        gain = f"gain over another's explanation ({title(measure)})"
        yield f"gain{ending}", gain, partial(_gain, site, measure)
    for name in NUMBERS:
        yield name, name, partial(_number, site, name)
    if site.effects.layers:
        for name in EFFECTS:
            yield name, name.replace("_", " "), partial(site.effect, name)


def _own(site: OpenedSite, measure: Measure, layer: int) -> Float[np.ndarray, " n"]:
    return site.scored(measure, layer).own


def _gain(site: OpenedSite, measure: Measure, layer: int) -> Float[np.ndarray, " n"]:
    return site.scored(measure, layer).gain


def _number(site: OpenedSite, name: str, layer: int) -> Float[np.ndarray, " n"]:
    return site.units(layer).numbers[name]


def _joined(site: OpenedSite, of_layer: OfLayer) -> Float[np.ndarray, " n"]:
    return np.concatenate([of_layer(layer) for layer in site.layers])
