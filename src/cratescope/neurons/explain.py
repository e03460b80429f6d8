"""Ask a language model for one phrase a neuron, from the words that excite it most."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerFast

from cratescope.arm import Arm
from cratescope.config import ExplainConfig
from cratescope.hardware import share
from cratescope.lm.tokenizer import load_tokenizer, token_strings, vocabulary_strings
from cratescope.neurons.kept import Kept, explanations
from cratescope.neurons.llm import LanguageModel, NoAnswer, RefusedError, llm_identity, open_llm
from cratescope.neurons.llm.answers import EMPTY_ANSWER, ONLY_REASONING
from cratescope.neurons.llm.reasoning import without_reasoning
from cratescope.neurons.prompts import Shown, Wording, clean_answer, wording_named
from cratescope.neurons.protocols import Protocol, protocols_named
from cratescope.neurons.records import (
    ActivationRecord,
    Explanation,
    NeuronRecord,
    layer_file,
    read_columns,
    read_records,
)
from cratescope.run import IDENTITY, Run, UserError, claim, read_json

FORMAT = 2
"""Of the files that explain, simulate, judge and score write: 1 was a JSON file per neuron."""
AT_ONCE = 512
"""Records held in memory at once."""
MAX_TOKENS = 60
"""Longest answer (paper section 4)."""
ENOUGH = 16
"""So many refusals and useless answers, and nothing else, are no matter of single neurons."""
DEAD = "dead neuron"
NOTHING_TO_SHOW = "no readable token"
UNDECODABLE = "tokens the tokenizer does not have"
STDERR = Console(stderr=True)
Result = TypeVar("Result")


def explain(config: ExplainConfig, llm: LanguageModel | None = None) -> list[Path]:
    """Write an explanation of every sampled neuron and return the folder of each explanation set.

    A dead neuron, or one whose answer is empty or refused, gets a row with no text and the reason in `skipped`, so
    that the sample stays what was drawn. Finished rows are kept.

    Raises:
        UserError: no such site, layer, protocol or number of neurons; a folder holds explanations of something else; or
            a server gives no answer that can be used.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    samples = _samples(config, run.records(site))
    wording = wording_named(config.prompts)
    max_tokens = config.llm.llm_max_tokens or MAX_TOKENS
    made_with = {"prompt": wording.explain_version, "max_tokens": max_tokens, "neuron_seed": config.neuron_seed}
    made_with = records_identity(run, site) | llm_identity(config.llm, llm) | made_with
    tokenizer = load_tokenizer(run.model)
    folders = []
    for explained, protocols in protocols_named(config.protocols).items():
        kept = explanations(run.explanations(site, config.llm.llm_name, explained))
        identity = made_with | {"explained": explained}
        if (kept.folder / "manifest.json").exists():
            claim(kept.folder, identity)
        folders.append(kept.folder)
        with kept.writing() as keep:
            waiting = Waiting(functools.partial(claim_and_keep, kept.folder, identity, keep), ENOUGH)
            for layer, indices in samples.items():
                indices = share(indices, config.worker, config.llm.llm_batch)
                done = kept.done(layer) & {*indices}
                if len(done) < len(indices):
                    llm = llm or open_llm(config.llm)
                    asking = Asking(llm, tokenizer, wording, protocols[0], config.llm.llm_name, max_tokens)
                    path = layer_file(run.records(site), layer)
                    _explain_layer(path, layer, indices, done, waiting, asking, config.llm.llm_batch)
            waiting.end(functools.partial(_has_text, kept))
    return folders


def claim_and_keep(folder: Path, identity: dict[str, Any], keep: Callable[[Result], None], item: Result) -> None:
    """Keep a result in a folder that is claimed with the first one.

    Not before: a model or server that gives no answer leaves no folder, and after a stop with advice another
    --llm-max-tokens is free to start.
    """
    claim(folder, identity)
    keep(item)


def _has_text(kept: Kept[Explanation]) -> bool:
    return any(item.text for _, item in kept.all())


class Waiting(Generic[Result]):
    """Results that tell only of refusals and useless answers wait until something was answered.

    A wrong option, or too few tokens, spoils every answer; it must not be written as that many skipped neurons.
    """

    def __init__(self, write: Callable[[Result], None], enough: int) -> None:
        self._write, self._enough = write, enough
        self._results: list[Result] = []
        self._problems: list[UserError] = []
        self.answered = False

    def add(self, result: Result, problem: UserError | None) -> None:
        """Write, or keep, what is known of a neuron. Raises the first problem when there are enough and no answer."""
        self._results.append(result)
        self._problems += [problem] if problem else []
        if self.answered:
            self._flush()
        elif len(self._problems) >= self._enough:
            raise self._problems[0]

    def end(self, answered_before: Callable[[], bool]) -> None:
        """Write what waits. Raises the first problem when nothing was ever answered."""
        if self._problems and not self.answered and not answered_before():
            raise self._problems[0]
        self._flush()

    def _flush(self) -> None:
        for result in self._results:
            self._write(result)
        self._results = []


def find_site(run: Run, site: str) -> str:
    """The name of the records folder meant by `site`: `auto` is the arm's native site, or the only one there is.

    Raises:
        UserError: no such folder, or several and `auto` cannot choose.
    """
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


def draw_neurons(path: Path, seed: int, layer: int) -> list[int]:
    """Every neuron of a layer's records in the order in which they are drawn.

    Raises:
        UserError: the file is missing or damaged.
    """
    known = read_columns(path, ["index"]).column("index").to_numpy()
    return known[neuron_order(seed, layer, len(known))].tolist()


def record_files(folder: Path, layers: Sequence[int] | None = None) -> dict[int, Path]:
    """The finished records of `layers`, or of every layer there is, by layer.

    Raises:
        UserError: the folder is not finished, or has no such layer.
    """
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
    path: Path,
    layer: int,
    indices: Sequence[int],
    done: Container[int],
    waiting: Waiting[Explanation],
    asking: Asking,
    batch: int,
) -> None:
    """Explain one layer's sample in batches that depend on the sample alone.

    Rounding differs with what else is in a batch and may turn a close choice of the model, so a batch with a missing
    neuron is asked again as a whole: an interrupted run ends with the same bytes as one that was not.
    """
    chunks = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    pending = [chunk for chunk in chunks if any(index not in done for index in chunk)]
    work = with_records(path, pending, AT_ONCE // batch + 1)
    for chunk, records in track(work, f"explain layer {layer}", len(pending), console=STDERR, transient=True):
        found = asking.asked([records[index] for index in chunk])
        waiting.answered |= any(explanation.text for explanation, _ in found)
        for explanation, problem in found:
            if explanation.neuron.index not in done:
                waiting.add(explanation, problem)


def with_records(
    path: Path, chunks: Iterable[Sequence[int]], together: int
) -> Iterator[tuple[Sequence[int], dict[int, NeuronRecord]]]:
    """Chunks of neuron indices with their records, which are read for `together` chunks at once."""
    waiting = iter(chunks)
    while group := list(itertools.islice(waiting, together)):
        records = read_records(path, sorted({index for chunk in group for index in chunk}))
        for chunk in group:
            yield chunk, records


@dataclass(frozen=True)
class Asking:
    """Who is asked for explanations, in which words, and from which windows."""

    llm: LanguageModel
    tokenizer: PreTrainedTokenizerFast
    wording: Wording
    protocol: Protocol
    explainer: str
    max_tokens: int = MAX_TOKENS

    def explanations(self, records: Sequence[NeuronRecord]) -> list[Explanation]:
        """One a neuron, in one call of the model."""
        return [explanation for explanation, _ in self.asked(records)]

    def asked(self, records: Sequence[NeuronRecord]) -> list[tuple[Explanation, UserError | None]]:
        """The same, each with what to say where a server's answer cannot be used and no other can."""
        asked = [self._prompt(record) for record in records]
        prompts = [self.llm.encode(prompt) for prompt, _ in asked if prompt]
        answers = iter(self._answers(prompts) if prompts else [])
        found = []
        for record, (prompt, reason) in zip(records, asked, strict=True):
            answer = next(answers) if prompt else ""
            text, problem = "", None
            if isinstance(answer, NoAnswer):
                reason, problem = answer.reason, self._problem(answer)
            elif prompt:
                text = clean_answer(answer)
                unsaid = ONLY_REASONING if answer.strip() and not without_reasoning(answer).strip() else EMPTY_ANSWER
                reason = None if text else unsaid
            one = Explanation(record.neuron, text, self.explainer, self.wording.explain_version, reason)
            found.append((one, problem))
        return found

    def _answers(self, prompts: Sequence[list[int]]) -> Sequence[str | NoAnswer]:
        prefix = self.llm.encode(self.wording.explain_prefix())
        try:
            return self.llm.generate(prefix, prompts, self.max_tokens, "\n")
        except RefusedError as error:
            return error.answers

    def _problem(self, answer: NoAnswer) -> UserError:
        told = f"{self.explainer}: none of its answers can be used, the first one for this reason: {answer.reason}"
        return UserError(f"{told}; {answer.fix}")

    def _prompt(self, record: NeuronRecord) -> tuple[str, str | None]:
        """The neuron's own part of the prompt, or why there is none."""
        if record.dead:
            return "", DEAD
        windows = self.protocol.explain_records(record)
        if undecodable(windows, len(vocabulary_strings(self.tokenizer))):
            return "", UNDECODABLE
        shown = [Shown(token_strings(self.tokenizer, window.tokens.tolist()), window.activations) for window in windows]
        prompt = self.wording.explain_prompt(shown, record.moments.maximum)
        return prompt, None if prompt else NOTHING_TO_SHOW


def undecodable(windows: Iterable[ActivationRecord], n_ids: int) -> bool:
    """Is there a token that the tokenizer (with ids below `n_ids`) does not have?"""
    return any(((window.tokens < 0) | (window.tokens >= n_ids)).any() for window in windows)
