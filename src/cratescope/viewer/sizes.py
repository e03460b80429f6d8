"""What live text and edits in an exported page need of the records: numbers and histograms in full precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cratescope.neurons.records import NeuronRecord, read_records
from cratescope.neurons.steer import quantile
from cratescope.viewer.opened import OpenedSite
from cratescope.viewer.packed import Json
from cratescope.viewer.values import finite

AT_ONCE = 512
"""Records in memory at a time."""


def unit_sizes(site: OpenedSite, layer: int, indices: Sequence[int]) -> Json:
    """Of every unit of a layer what live text and edits need, in full precision: numbers and histogram."""
    names = ("density", "mean", "maximum")
    found: Json = {name: [] for name in ("index", *names, "quantile", "bins", "count")}
    edges: dict[tuple[float, float], int] = {}
    for start in range(0, len(indices), AT_ONCE):
        for index, record in read_records(site.file(layer), indices[start : start + AT_ONCE], strata=()).items():
            bins = [] if record.histogram is None else _numbered(record, edges)
            found["index"].append(index)
            found["density"].append(finite(record.density))
            found["mean"].append(finite(record.moments.mean))
            found["maximum"].append(finite(record.moments.maximum))
            found["quantile"].append(finite(quantile(record)) if bins else None)
            found["bins"].append(np.diff(bins, prepend=0).tolist())
            found["count"].append(record.histogram.count.tolist() if record.histogram is not None else [])
    return found | {"edges": [*edges]}


def _numbered(record: NeuronRecord, edges: dict[tuple[float, float], int]) -> list[int]:
    """The bins of a histogram by number; new ones are added to `edges`."""
    assert record.histogram is not None
    pairs = zip(record.histogram.low.tolist(), record.histogram.high.tolist(), strict=True)
    return [edges.setdefault(pair, len(edges)) for pair in pairs]
