"""Which records and which neurons of a run a stage is about."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from cratescope.arm import Arm
from cratescope.errors import UserError
from cratescope.files import read_json
from cratescope.neurons.records import (
    STRATIFICATIONS,
    NeuronRecord,
    Window,
    bytes_per_row,
    columns_with,
    layer_width,
    read_columns,
    records_of,
)
from cratescope.run import IDENTITY, Run, claim

FORMAT = 2
"""Of the files that explain, simulate, judge and score write: 1 was a JSON file per neuron."""
HELD = 1 << 29
"""Bytes of records that are held as columns, which take a fraction of the room."""
SAE = "sae/"
"""What the name of a site begins with that is the features of sparse autoencoders (neurons/coded.py)."""
DEAD = "dead neuron"
UNDECODABLE = "tokens the tokenizer does not have"


def find_site(run: Run, site: str) -> str:
    """The name of the records folder meant by `site`: `auto` is the arm's native site, or the only one there is.

    Raises UserError: no such folder, or several and `auto` cannot choose.
    """
    if not run.root.exists():
        run.read_manifest()  # refuses it, and names the models of the zoo
    site = site.replace("{layer}", "N")  # as `collect` names the folder of a pattern
    folder = run.root / "records"
    paths = folder.iterdir() if folder.exists() else ()
    found = sorted(path.name for path in paths if path.is_dir() and not path.name.startswith("."))
    listed = ", ".join(found) or "none"
    if site == "auto" and len(found) > 1 and run.manifest.exists():
        native = run.records(Arm.of(run.read_manifest()).site).name
        found = [native] if native in found else found
    if site != "auto" and run.records(site).name not in found:
        raise UserError(f"{run.root}: no records of site {site} (found: {listed}); run `cratescope collect` first")
    if site == "auto" and len(found) != 1:
        fix = "name one with --site" if found else "run `cratescope collect` first"
        raise UserError(f"{run.root}: --site auto needs records of one site (found: {listed}); {fix}")
    return found[0] if site == "auto" else run.records(site).name


def records_identity(run: Run, site: str) -> dict[str, Any]:
    """What every later stage says its neurons come from: the weights, and how the records were collected.

    Imported records come without weights.
    """
    manifest = run.records(site) / "manifest.json"
    collected = read_json(manifest, IDENTITY, "`cratescope collect`")["identity"] if manifest.exists() else {}
    weights = {} if "imported" in collected else {"model_sha256": run.fingerprint()}
    return weights | {"format": FORMAT, "site": site, "records": collected}


def check_identity(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What a finished stage's folder was made from. Raises UserError when that is not `wanted`."""
    identity = read_json(folder / "manifest.json", IDENTITY)["identity"]
    claim(folder, identity | wanted)
    return identity


def neuron_order(seed: int, layer: int, n_neurons: int) -> Int[np.ndarray, " h"]:
    """Every index of the layer in the order in which neurons are drawn: a longer sample begins with a shorter one."""
    return np.random.default_rng([seed, layer]).permutation(n_neurons)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The neurons of a layer that are recorded: their indices (n,), rising, among the `width` that it has."""

    index: Int64[np.ndarray, " n"]
    width: int

    @classmethod
    def every(cls, width: int) -> Chosen:
        return cls(np.arange(width), width)

    @classmethod
    def drawn(cls, n: int, seed: int, layer: int, width: int) -> Chosen:
        """The first `n` in the order in which neurons are drawn from all of the layer."""
        return cls(np.sort(neuron_order(seed, layer, width)[:n]), width)


def draw_neurons(path: Path, seed: int, layer: int) -> list[int]:
    """Every neuron of a layer's records in the order in which they are drawn. Errors as of `read_columns`.

    Those of a sample come in the order in which they would be drawn from records of the whole layer.
    """
    known, width = read_columns(path, ["index"]).column("index").to_numpy(), layer_width(path)
    every = known if len(known) == width else np.arange(width)
    drawn = every[neuron_order(seed, layer, width)]
    return drawn[np.isin(drawn, known)].tolist()


def record_files(folder: Path, layers: Sequence[int] | None = None) -> dict[int, Path]:
    """The finished records of `layers`, or of all, by layer. UserError: the folder is unfinished, or lacks a layer."""
    if (folder / ".parts").exists():
        raise UserError(f"{folder}: not finished; run the same `cratescope collect` again")
    files = {int(path.stem[6:]): path for path in sorted(folder.glob("layer-*.parquet")) if path.stem[6:].isdecimal()}
    if not files:
        raise UserError(f"{folder}: has no records of any layer; run `cratescope collect`")
    for layer in layers or ():
        if layer not in files:
            known = ", ".join(map(str, files))
            raise UserError(f"--layers {layer}: no such layer; {folder} has layers {known}")
    return {layer: files[layer] for layer in (sorted(files) if layers is None else layers)}


def with_records(
    path: Path, chunks: Iterable[Sequence[int]], together: int, strata: Collection[str] = STRATIFICATIONS
) -> Iterator[tuple[Sequence[int], dict[int, NeuronRecord]]]:
    """Chunks of neuron indices with their records, which are made for `together` chunks at once.

    Neurons are drawn from all over a file, so it is read for as many of them as `HELD` bytes hold: once or a few times.
    strata: as of `read_records`.
    """
    waiting, size = iter(chunks), bytes_per_row(path)
    while groups := _groups(waiting, together, HELD // size):
        wanted = sorted({index for group in groups for one in group for index in one})
        table = read_columns(path, columns_with(strata), wanted)
        for group in groups:
            records = records_of(path, table, sorted({index for chunk in group for index in chunk}))
            for chunk in group:
                yield chunk, records


def _groups(waiting: Iterator[Sequence[int]], together: int, most: int) -> list[list[Sequence[int]]]:
    """Groups of `together` chunks, until there are `most` neurons."""
    groups: list[list[Sequence[int]]] = []
    while sum(len(chunk) for group in groups for chunk in group) < most or not groups:
        if not (group := list(itertools.islice(waiting, together))):
            break
        groups.append(group)
    return groups


def undecodable(windows: Iterable[Window], n_ids: int) -> bool:
    """Is there a token that the tokenizer (with ids below `n_ids`) does not have?"""
    return any(((window.tokens < 0) | (window.tokens >= n_ids)).any() for window in windows)
