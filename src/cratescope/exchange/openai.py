"""Records to and from OpenAI's NeuronRecord JSON, as automated-interpretability 0.0.24 loads it (docs/records.md)."""

from __future__ import annotations

import itertools
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cratescope.errors import UserError
from cratescope.exchange.config import ExportConfig, ImportConfig
from cratescope.files import SURROGATES, atomic_folder, decode_text, mark_whole, parse_json, write_json, write_text
from cratescope.locks import locked
from cratescope.neurons.records import (
    Moments,
    NeuronId,
    NeuronRecord,
    Stratum,
    Window,
    each_record,
    layer_file,
    read_columns,
    write_records,
)
from cratescope.run import Run, claim, made_from, versions
from cratescope.text.sources import files_below, name_some
from cratescope.text.tokenizer import EOS, load_tokenizer, vocabulary_strings

IMPORTED = "imported"
"""Site of imported records: a NeuronRecord does not say of what its activations are."""
LARGEST = float(np.finfo(np.float32).max)
LARGEST_INDEX = (1 << 31) - 1
STDERR = Console(stderr=True)
Json = dict[str, Any]


def write(config: ExportConfig, run: Run, files: Mapping[int, Path], identity: Json) -> None:
    """Write one {layer}/{neuron}.json per neuron."""
    vocabulary = vocabulary_strings(load_tokenizer(run.model))
    for path in files.values():  # a damaged one is refused before anything is written
        read_columns(path, ["index"])
    claim(config.out, identity)
    for layer, path in files.items():
        label, total = f"export layer {layer}", read_columns(path, ["index"]).num_rows
        for record in track(each_record(path), label, total, console=STDERR, transient=True):
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


def import_records(config: ImportConfig) -> Path:
    """Write the NeuronRecords of a folder as records of a new run, and return their folder.

    The tokens of a NeuronRecord are texts of a tokenizer that may not be here, so the run gets a tokenizer of its own,
    with one id for every different text. What a NeuronRecord lacks is left open: the number of tokens read is
    0, the density NaN (0 for a neuron that is silent in all of its windows), missing moments NaN; the maximum is that
    of the windows. A top window's peak is its highest token, another window's its middle one. Tokens that hold what
    has no UTF-8 get U+FFFD in its place; they are counted in the folder's manifest, with a warning.

    Raises:
        UserError: no such files, a file that is not a NeuronRecord (names the file and the field), or `config.out` is
            the run of a model or holds other records.
    """
    run, (paths, left_out) = Run(config.out), _record_paths(config.source)
    if run.manifest.exists():
        raise UserError(f"{run.root}: is the run of a model; give --out a folder of its own")
    if left_out:
        _say(f"{config.source}: {name_some(left_out)}")
    folder = run.records(IMPORTED)
    identity = {"imported": "openai", "sha256": made_from(paths, config.source)["files"]}
    with locked(run.root, "import"):
        if folder.exists():
            claim(folder, identity)
        else:
            _write_imported(run, config, folder, paths, identity)
    return folder


def _write_imported(run: Run, config: ImportConfig, folder: Path, paths: Sequence[Path], identity: Json) -> None:
    vocabulary, invalid = {EOS: 0}, Counter[Path]()
    with atomic_folder(folder) as temporary:
        for layer, group in itertools.groupby(paths, lambda path: int(path.parent.name)):
            work: Any = track(list(group), f"import layer {layer}", console=STDERR, transient=True)
            with closing(work):  # else, if a file is refused, the bar stays until garbage collection
                records = [_read(path, run.name, vocabulary, invalid) for path in work]
            write_records(layer_file(temporary, layer), records)
        counted = {"invalid_utf8": invalid.total()}
        write_json(temporary / "manifest.json", {"identity": identity, "versions": versions()} | counted)
        with atomic_folder(run.model) as model:
            _tokenizer(vocabulary).save_pretrained(model)
            mark_whole(model)
    if invalid:
        found = f"{invalid.total()} tokens had invalid UTF-8, now U+FFFD; the first are in {next(iter(invalid))}"
        _say(f"warning: {config.source}: {found}")


def _say(line: str) -> None:
    STDERR.print(line, markup=False, highlight=False, soft_wrap=True)


def _record_paths(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Every {layer}/{neuron}.json in order, and reasons for what is left out, by name."""
    files, left_out = files_below(folder, (".json",)) if folder.is_dir() else ([], {})
    paths: dict[tuple[int, int], Path] = {}
    for name, path in files:
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


def _tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """Build a tokenizer that decodes ids to exactly these texts; it does not encode."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)


def _read(path: Path, model: str, vocabulary: dict[str, int], invalid: Counter[Path]) -> NeuronRecord:
    """Read the record in a file; new token texts are added to `vocabulary`, and repaired ones counted in `invalid`."""
    row = _read_json(path)
    neuron = NeuronId(model, IMPORTED, *_neuron_id(path, row))

    def token_id(token: str) -> int:
        mended = SURROGATES.sub("\ufffd", token)
        if mended != token:
            invalid[path] += 1
        return vocabulary.setdefault(mended, len(vocabulary))

    excerpts = itertools.count()  # whether two windows overlap is not known: each counts as an excerpt of its own

    def windows(name: str, rows: Any, at_highest: bool = False) -> tuple[Window, ...]:
        found = []
        for place, row in enumerate(_list(path, name, rows)):
            tokens, activations = _window(f"{path}: {name}[{place}]", row)
            ids = np.array([token_id(token) for token in tokens], np.int64)
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
