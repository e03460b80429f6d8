"""Records to and from OpenAI's NeuronRecord JSON, as automated-interpretability 0.0.24 loads it (docs/records.md)."""

from __future__ import annotations

import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from cratescope.errors import UserError
from cratescope.exchange.config import ExportConfig
from cratescope.exchange.imports import IMPORTED, TokenTexts
from cratescope.files import decode_text, parse_json, write_text
from cratescope.neurons.records import (
    Moments,
    NeuronId,
    NeuronRecord,
    Stratum,
    Window,
    each_record,
    read_columns,
)
from cratescope.progress import progress
from cratescope.run import Run, claim
from cratescope.text.sources import files_below, name_some
from cratescope.text.tokenizer import load_tokenizer, vocabulary_strings

LARGEST = float(np.finfo(np.float32).max)
LARGEST_INDEX = (1 << 31) - 1
Json = dict[str, Any]


def write(config: ExportConfig, run: Run, files: Mapping[int, Path], identity: Json) -> None:
    """Write one {layer}/{neuron}.json per neuron."""
    vocabulary = vocabulary_strings(load_tokenizer(run.model))
    for path in files.values():  # a damaged one is refused before anything is written
        read_columns(path, ["index"])
    claim(config.out, identity)
    for layer, path in files.items():
        label, total = f"export layer {layer}", read_columns(path, ["index"]).num_rows
        for record in progress(each_record(path), label, total):
            target = config.out / str(layer) / f"{record.neuron.index}.json"
            if not target.exists():
                write_text(target, json.dumps(_openai_json(record, vocabulary), ensure_ascii=False, allow_nan=False))


def _openai_json(record: NeuronRecord, vocabulary: Sequence[str]) -> Json:
    """A NeuronRecord; the boundaries between the five samples by quantile are the inner four, as in OpenAI's files."""

    def windows(found: Iterable[Window]) -> list[Json]:
        return [
            {
                "dataclass_name": "ActivationRecord",
                "tokens": [vocabulary[token] for token in window.tokens.tolist()],
                # Shortest decimals that give the same float32 back; most are zero.
                "activations": [float(str(value)) if value else 0.0 for value in window.activations],
            }
            for window in found
        ]

    neuron, strata = record.neuron, record.by_quantile
    moments = {name: getattr(record.moments, name) for name in ("mean", "variance", "skewness", "kurtosis")}
    return {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {"dataclass_name": "NeuronId", "layer_index": neuron.layer, "neuron_index": neuron.index},
        "random_sample": windows(record.random),
        "random_sample_by_quantile": [windows(stratum.windows) for stratum in strata] or None,
        "quantile_boundaries": [_known(stratum.low) for stratum in strata[1:]] or None,
        **{name: _known(value) for name, value in moments.items()},
        "most_positive_activation_records": windows(record.top),
    }


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def read(paths: Sequence[Path], model: str, texts: TokenTexts) -> Iterator[tuple[int, list[NeuronRecord]]]:
    """Each layer with its records, from files in the order of `files`. UserError names a file that is no NeuronRecord.

    What a NeuronRecord lacks is left open: the number of tokens read is 0, the density NaN (0 for a neuron that is
    silent in all of its windows), missing moments NaN; the maximum is that of the windows. A top window's peak is its
    highest token, another window's its middle one.
    """
    for layer, group in itertools.groupby(paths, lambda path: int(path.parent.name)):
        work: Any = progress(list(group), f"import layer {layer}")
        with closing(work):  # else, if a file is refused, the bar stays until garbage collection
            yield layer, [_read(path, model, texts) for path in work]


def files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Every {layer}/{neuron}.json in order, and reasons for what is left out, by name. UserError if there is none."""
    found, left_out = files_below(folder, (".json",)) if folder.is_dir() else ([], {})
    paths: dict[tuple[int, int], Path] = {}
    for name, path in found:
        if name.count("/") != 1:
            left_out[name] = "not in a layer's folder"
            continue
        if not all(re.fullmatch(r"0|[1-9][0-9]*", part) for part in (path.parent.name, path.stem)):
            raise UserError(f"{path}: not named {{layer}}/{{neuron}}.json with two numbers; move it elsewhere")
        place = int(path.parent.name), int(path.stem)
        if max(place) > LARGEST_INDEX:
            raise UserError(f"{path}: layer and neuron have to be below {LARGEST_INDEX + 1:,}; rename it")
        if place in paths:
            raise UserError(f"{path}: is the same neuron as {paths[place].name}; move one of them elsewhere")
        paths[place] = path
    if not paths:
        but = f" ({name_some(left_out)})" if left_out else ""
        fix = "name the folder that holds the layers'"
        raise UserError(f"{folder}: no files {{layer}}/{{neuron}}.json there{but}; {fix}")
    return [paths[place] for place in sorted(paths)], left_out


def _read(path: Path, model: str, texts: TokenTexts) -> NeuronRecord:
    row = _read_json(path)
    neuron = NeuronId(model, IMPORTED, *_neuron_id(path, row))
    excerpts = itertools.count()  # whether two windows overlap is not known: each counts as an excerpt of its own

    def windows(name: str, rows: Any, at_highest: bool = False) -> tuple[Window, ...]:
        found = []
        for place, row in enumerate(_list(path, name, rows)):
            tokens, activations = _window(f"{path}: {name}[{place}]", row)
            ids = np.array([texts.id(token, path) for token in tokens], np.int64)
            peak = int(activations.argmax()) if at_highest else len(tokens) // 2
            found.append(Window(ids, activations, next(excerpts), 0, peak))
        return tuple(found)

    top = windows("most_positive_activation_records", row.get("most_positive_activation_records"), at_highest=True)
    random = windows("random_sample", row.get("random_sample"))
    name = "random_sample_by_quantile"
    samples = [] if row.get(name) is None else _list(path, name, row[name])
    by_quantile = [windows(f"{name}[{place}]", sample) for place, sample in enumerate(samples)]
    found = itertools.chain(top, random, *by_quantile)
    everything = np.concatenate([np.zeros(0), *(window.activations for window in found)])
    maximum = float(everything.max(initial=-math.inf)) if len(everything) else 0.0
    bounds = [float(everything.min(initial=maximum)), *_boundaries(path, row, len(samples)), maximum]
    return NeuronRecord(
        neuron=neuron,
        top=top,
        random=random,
        moments=_moments(path, row, maximum),
        density=math.nan if everything.any() else 0.0,
        by_quantile=tuple(map(Stratum, bounds, bounds[1:], by_quantile)),
    )


def _read_json(path: Path) -> Json:
    try:
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    row = parse_json(text, str(path), "export it again where it was made")
    if not isinstance(row, dict) or row.get("dataclass_name", "NeuronRecord") != "NeuronRecord":
        raise UserError(f"{path}: not a NeuronRecord; only files of OpenAI's NeuronRecord class can be imported")
    return row


def _neuron_id(path: Path, row: Json) -> tuple[int, int]:
    found = row.get("neuron_id")
    layer, index = (found.get(name) if isinstance(found, dict) else None for name in ("layer_index", "neuron_index"))
    if type(layer) is not int or type(index) is not int:
        raise UserError(f"{path}: neuron_id has to have whole numbers layer_index and neuron_index")
    if (path.parent.name, path.stem) != (str(layer), str(index)):
        raise UserError(f"{path}: neuron_id says layer {layer}, neuron {index}; rename it {layer}/{index}.json")
    return layer, index


def _list(path: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{path}: {name} is missing or not a list")
    return value


def _window(where: str, row: Any) -> tuple[list[str], np.ndarray]:
    """Tokens and activations (w,) of a window; `where` names it in an error."""
    row = row if isinstance(row, dict) else {}
    tokens, activations = row.get("tokens"), row.get("activations")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{where}.tokens has to be a list of texts, at least one")
    if not isinstance(activations, list) or len(activations) != len(tokens):
        found = len(activations) if isinstance(activations, list) else "no"
        raise UserError(f"{where}: {len(tokens)} tokens and {found} activations; it needs one for each")
    for place, value in enumerate(activations):
        if not _is_number(value):
            raise _not_a_number(f"{where}.activations[{place}]", value)
    return tokens, np.array(activations, np.float32)


def _is_number(value: Any) -> bool:
    """Whether the value is a finite number within the range of float32."""
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def _not_a_number(where: str, value: Any) -> UserError:
    return UserError(f"{where} is {reprlib.repr(value)}, not a finite number; export the file again where it was made")


def _number(path: Path, name: str, value: Any) -> float:
    """A number of the file, NaN if absent."""
    if value is not None and not _is_number(value):
        raise _not_a_number(f"{path}: {name}", value)
    return math.nan if value is None else float(value)


def _boundaries(path: Path, row: Json, n_samples: int) -> list[float]:
    """The activations between the samples by quantile; NaN if absent."""
    inner, name = max(n_samples - 1, 0), "quantile_boundaries"
    if row.get(name) is None:
        return [math.nan] * inner
    found = _list(path, name, row[name])
    if len(found) != inner:
        raise UserError(f"{path}: {len(found)} {name} for {n_samples} samples; it needs the {inner} between them")
    return [_number(path, f"{name}[{place}]", value) for place, value in enumerate(found)]


def _moments(path: Path, row: Json, maximum: float) -> Moments:
    found = {name: _number(path, name, row.get(name)) for name in ("mean", "variance", "skewness", "kurtosis")}
    if found["variance"] < 0:
        raise UserError(f"{path}: variance is {found['variance']}, below 0; export the file again where it was made")
    skewness, kurtosis = (None if found["variance"] == 0 else found[name] for name in ("skewness", "kurtosis"))
    return Moments(0, found["mean"], found["variance"], skewness, kurtosis, maximum)
