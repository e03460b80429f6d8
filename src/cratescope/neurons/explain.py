"""Ask a language model for one phrase a neuron, from the words that excite it most."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerFast

from cratescope.config import ExplainConfig, LLMConfig
from cratescope.lm.tokenizer import load_tokenizer, token_strings
from cratescope.neurons import prompts
from cratescope.neurons.llm import LanguageModel, llm_identity, open_llm
from cratescope.neurons.records import (
    PROTOCOLS,
    Explanation,
    NeuronRecord,
    layer_file,
    read_records,
    write_explanation,
)
from cratescope.run import Run, UserError, claim, read_json

MAX_TOKENS = 60
"""Longest answer (paper section 4)."""
DEAD = "dead neuron"
NOTHING_TO_SHOW = "no readable token"
EMPTY_ANSWER = "empty answer"
STDERR = Console(stderr=True)


def explain(config: ExplainConfig, llm: LanguageModel | None = None) -> Path:
    """Write one explanation file for every sampled neuron and return their folder.

    A dead neuron, or one whose answer is empty, gets a file with no text and the reason in `skipped`, so that the
    sample stays what was drawn. Finished files are kept.

    Raises:
        UserError: no such site, layer or number of neurons; or the folder holds explanations of something else.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    samples = _samples(config, run.records(site))
    folder = run.explanations(site, config.llm.llm)
    wanted = {"prompt": prompts.EXPLAIN_PROMPT, "max_tokens": MAX_TOKENS, "neuron_seed": config.neuron_seed}
    claim(folder, records_identity(run, site) | llm_identity(config.llm, llm) | wanted)
    tokenizer = load_tokenizer(run.model)
    for layer, indices in samples.items():
        done = {index for index in indices if (folder / str(layer) / f"{index}.json").exists()}
        if len(done) < len(indices):
            llm = llm or open_llm(config.llm)
            records = read_records(layer_file(run.records(site), layer), indices)
            _explain_layer([records[index] for index in indices], done, folder, llm, tokenizer, config.llm)
    return folder


def find_site(run: Run, site: str) -> str:
    """The name of the records folder meant by `site`: `auto` is the only one there is.

    Raises:
        UserError: no such folder, or several and `auto` cannot choose.
    """
    site = site.replace("{layer}", "N")  # as `collect` names the folder of a pattern
    folder = run.root / "records"
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
    listed = ", ".join(found) or "none"
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
    collected = read_json(manifest)["identity"] if manifest.exists() else {}
    weights = {} if "imported" in collected else {"model_sha256": run.fingerprint()}
    return weights | {"site": site, "records": collected}


def check_identity(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What a finished stage's folder was made from. Raises UserError when that is not `wanted`."""
    identity = read_json(folder / "manifest.json")["identity"]
    claim(folder, identity | wanted)
    return identity


def neuron_order(seed: int, layer: int, n_neurons: int) -> Int[np.ndarray, " h"]:
    """Every index of the layer in the order in which neurons are drawn: a longer sample begins with a shorter one."""
    return np.random.default_rng([seed, layer]).permutation(n_neurons)


def draw_neurons(path: Path, seed: int, layer: int) -> list[int]:
    """Every neuron of a layer's records in the order in which they are drawn.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        known = pq.read_table(path, columns=["index"]).column("index").to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and run `cratescope collect`") from error
    return known[neuron_order(seed, layer, len(known))].tolist()


def record_files(folder: Path, layers: Sequence[int] | None = None) -> dict[int, Path]:
    """The finished records of `layers`, or of every layer there is, by layer.

    Raises:
        UserError: the folder is not finished, or has no such layer.
    """
    if (folder / ".parts").exists():
        raise UserError(f"{folder}: not finished; run the same `cratescope collect` again")
    files = {int(path.stem.removeprefix("layer-")): path for path in sorted(folder.glob("layer-*.parquet"))}
    for layer in layers or ():
        if layer not in files:
            known = ", ".join(map(str, files)) or "none"
            raise UserError(f"--layers {layer}: no such layer; {folder} has layers {known}")
    return {layer: files[layer] for layer in (sorted(files) if layers is None else layers)}


def _samples(config: ExplainConfig, folder: Path) -> dict[int, list[int]]:
    """The neurons to explain in every layer, in the order they were drawn."""
    samples = {}
    for layer, path in record_files(folder, config.layers).items():
        drawn = draw_neurons(path, config.neuron_seed, layer)
        wanted = len(drawn) if config.neurons is None else config.neurons
        if not 1 <= wanted <= len(drawn):
            raise UserError(
                f"--neurons {wanted}: layer {layer} has {len(drawn)} neurons; give a number from 1 to {len(drawn)}"
            )
        samples[layer] = drawn[:wanted]
    return samples


def _explain_layer(
    records: Sequence[NeuronRecord],
    done: Container[int],
    folder: Path,
    llm: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: LLMConfig,
) -> None:
    """Explain one layer's sample in batches that depend on the sample alone.

    Rounding differs with what else is in a batch and may turn a close choice of the model, so a batch with a missing
    file is asked again as a whole: an interrupted run ends with the same bytes as one that was not.
    """
    chunks = [records[start : start + settings.llm_batch] for start in range(0, len(records), settings.llm_batch)]
    for chunk in track(chunks, f"explain layer {records[0].neuron.layer}", console=STDERR, transient=True):
        if all(record.neuron.index in done for record in chunk):
            continue
        for explanation in _ask(chunk, llm, tokenizer, settings.llm):
            if explanation.neuron.index not in done:
                write_explanation(folder, explanation)


def _ask(
    records: Sequence[NeuronRecord], llm: LanguageModel, tokenizer: PreTrainedTokenizerFast, explainer: str
) -> list[Explanation]:
    words = [_words(record, tokenizer) for record in records]
    asked = [llm.encode(prompts.explain_prompt(row)) for row in words if row]
    answers = iter(llm.generate(llm.encode(prompts.explain_prefix()), asked, MAX_TOKENS, "\n") if asked else [])
    found = []
    for record, row in zip(records, words, strict=True):
        text = prompts.clean_answer(next(answers)) if row else ""
        reason = DEAD if record.dead else NOTHING_TO_SHOW if not row else None if text else EMPTY_ANSWER
        found.append(Explanation(record.neuron, text, explainer, prompts.EXPLAIN_PROMPT, reason))
    return found


def _words(record: NeuronRecord, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    if record.dead:
        return []
    # Every protocol explains from the same records (their explain_top are equal), so one explanation serves them all.
    windows = next(iter(PROTOCOLS.values())).explain_records(record)
    return prompts.strongest_words(
        [
            (
                token_strings(tokenizer, window.tokens.tolist()),
                prompts.levels(window.activations, record.moments.maximum),
            )
            for window in windows
        ]
    )
