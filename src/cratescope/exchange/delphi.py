"""Records as the cache of activations that delphi's LatentDataset opens (eai-delphi 0.1.3, docs/records.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from safetensors.numpy import save_file

from cratescope.errors import UserError
from cratescope.exchange.config import ExportConfig
from cratescope.files import atomic_folder, atomic_path, sha256, write_json
from cratescope.lm.load import data_of
from cratescope.neurons.records import layer_file, read_columns
from cratescope.neurons.tensors import load_tensors
from cratescope.run import Run, claim
from cratescope.text.tokenizer import load_tokenizer

FILES = 5
"""Fewest files a module's cache is cut into, delphi's own default."""
PER_FILE = 1 << 26
"""Most activations wanted in one of them: about 700 MB."""


def write(config: ExportConfig, run: Run, files: Mapping[int, Path], identity: dict[str, Any]) -> None:
    """Write `latents`/{module}/{first}_{last}.safetensors and config.json of every layer in `files`."""
    collected, folder = identity["records"], next(iter(files.values())).parent
    if not collected.get("dump"):
        raise UserError(
            f"{folder}: delphi wants every non-zero activation and the records were made without; "
            f"delete that folder and run `cratescope collect {run.root} --dump`"
        )
    data = data_of(run, config.data)
    if sha256(data.path / "manifest.json") != collected["data_sha256"]:
        raise UserError(f"{data.path}: not the data the records were collected from; name that folder with --data")
    tokens = data.split("heldout").spaced(collected["excerpts"], collected["context"])
    claim(config.out, identity)
    # In a folder of its own: next to a model's config.json transformers would ask to run the model's code.
    with atomic_folder(config.out / "tokenizer") as folder_of_tokenizer:
        load_tokenizer(run.model).save_pretrained(folder_of_tokenizer)
    for layer in files:
        target = config.out / "latents" / collected["site"].replace("{layer}", str(layer))
        if not (target / "config.json").exists():
            ranges = _write_latents(folder, layer, tokens, target)
            settings = {
                "dataset_repo": str(data.path.resolve()),
                "dataset_split": "heldout",
                "dataset_name": "",
                "dataset_column": "tokens",
                "batch_size": 1,
                "cache_ctx_len": tokens.shape[1],
                "n_tokens": tokens.size,
                "n_splits": ranges,
                "model_name": str((config.out / "tokenizer").resolve()),
            }
            write_json(target / "config.json", settings)


def _write_latents(folder: Path, layer: int, tokens: Integer[np.ndarray, "n t"], target: Path) -> int:
    """Write the files of one module and return how many there are; the dump is read once for each."""
    width = read_columns(layer_file(folder, layer), ["index"]).num_rows
    counts = np.zeros(width, np.int64)
    for part in _dump(folder, layer):
        counts += np.bincount(part["neurons"], minlength=width)
    n = min(max(FILES, -(-int(counts.sum()) // PER_FILE)), width)
    edges = np.linspace(0, width, n + 1).astype(int)
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        path = target / f"{first}_{end - 1}.safetensors"
        if not path.exists():
            found = _latents(_dump(folder, layer), int(counts[first:end].sum()), first, end, tokens.shape)
            with atomic_path(path) as temporary:
                save_file(found | {"tokens": tokens.astype(np.int64)}, temporary)
    return n


def _dump(folder: Path, layer: int) -> Iterator[dict[str, np.ndarray]]:
    """The parts of a layer's dump in the order of the text: counts (tokens,), neurons (m,) and values (m,)."""
    paths = sorted((folder / "dump" / f"layer-{layer:02d}").glob("part-*.safetensors"))
    for path in paths:
        part = load_tensors(path)
        if part is None:
            raise UserError(f"{path}: damaged; delete {folder} and run `cratescope collect --dump` again")
        yield {name: tensor.numpy() for name, tensor in part.items()}


def _latents(
    parts: Iterable[dict[str, np.ndarray]], n: int, first: int, end: int, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The `n` activations of the neurons from `first` to before `end`, with their row, place and neuron - first."""
    small = max(*shape, end - first) < 1 << 16
    locations = np.empty((n, 3), np.uint16 if small else np.uint32)
    activations = np.empty(n, np.float32)
    filled = token = 0
    for part in parts:
        at = np.repeat(np.arange(len(part["counts"])), part["counts"]) + token
        token += len(part["counts"])
        chosen = (part["neurons"] >= first) & (part["neurons"] < end)
        here = slice(filled, filled + int(chosen.sum()))
        filled = here.stop
        locations[here, 0], locations[here, 1] = np.divmod(at[chosen], shape[1])
        locations[here, 2] = part["neurons"][chosen] - first
        activations[here] = part["values"][chosen]
    return {"locations": locations, "activations": activations}
