"""Explain neurons: with a phrase of a language model, terms fitted to what they do, or the best of both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig
from cratescope.explain.explained import Explained, Explanation
from cratescope.explain.protocols import ExplanationSet, protocols_named
from cratescope.explain.waiting import Waiting, keeping
from cratescope.llm.interface import LanguageModel
from cratescope.neurons.records import AT_ONCE, NeuronRecord, layer_file, layer_width
from cratescope.neurons.sample import draw_neurons, find_site, record_files, records_identity, with_records
from cratescope.progress import progress
from cratescope.run import Run, claim
from cratescope.workers import share

ENOUGH = 16
"""So many refusals and useless answers, and nothing else, are no matter of single neurons."""


@runtime_checkable
class Explainer(Protocol):
    """Says what neurons find. batch: how many of them it is given at a time."""

    batch: int

    def made_with(self, chosen: ExplanationSet) -> dict[str, Any]:
        """What decides its explanations besides records and windows."""

    def explained(
        self, chosen: ExplanationSet, records: Sequence[NeuronRecord]
    ) -> Sequence[tuple[Explanation, UserError | None]]:
        """One a neuron, each with what to tell the user where it is missing and no other is there."""


def _explainer(config: ExplainConfig, run: Run, site: str, llm: LanguageModel | None) -> Explainer:
    """Only now what it needs is imported, so that none waits for the others' libraries."""
    if config.explainer == "terms":
        from cratescope.explain.terms.explainer import ByTerms

        return ByTerms(config.terms, run)
    if config.explainer == "selected":
        from cratescope.explain.selected import Selects

        return Selects(config, run, site, llm)
    from cratescope.explain.asking import Asks

    return Asks(config, run, site, llm)


def explain(config: ExplainConfig, llm: LanguageModel | None = None) -> list[Path]:
    """Write an explanation of every sampled neuron and return the folder of each explanation set.

    A dead neuron, or one whose answer is empty or refused, gets a row with no text and the reason in `skipped`, so
    that the sample stays what was drawn. Finished rows are kept.

    Raises:
        UserError: no such site, layer, protocol or number of neurons; a folder holds explanations of something else; a
            server gives no answer that can be used; or terms cannot be chosen from such records or tokens.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    samples = _samples(config, run.records(site))
    explainer = _explainer(config, run, site, llm)
    origin = records_identity(run, site) | {"neuron_seed": config.neuron_seed}
    folders = []
    for chosen in [one.again(config.windows) for one in protocols_named(config.protocols)]:
        kept = Explained(run, site, config.explainer_name, chosen.name).explanations
        made_with = origin | explainer.made_with(chosen) | {"explained": chosen.name}
        begin = functools.partial(claim, kept.folder, made_with)
        folders.append(kept.folder)
        with keeping(kept, begin, ENOUGH, lambda item: bool(item.text)) as waiting:
            for layer, indices in samples.items():
                indices = share(indices, config.worker, explainer.batch)
                done = kept.done(layer) & {*indices}
                if len(done) < len(indices):
                    path = layer_file(run.records(site), layer)
                    ask = functools.partial(explainer.explained, chosen)
                    _explain_layer(path, layer, indices, done, waiting, ask, explainer.batch)
    return folders


def _samples(config: ExplainConfig, folder: Path) -> dict[int, list[int]]:
    """The neurons to explain in every layer, in the order they were drawn."""
    samples = {}
    for layer, path in record_files(folder, config.layers).items():
        drawn = draw_neurons(path, config.neuron_seed, layer)
        wanted = len(drawn) if config.neurons is None else config.neurons
        if not 1 <= wanted <= len(drawn):
            sampled = f" that were collected (of {width})" if (width := layer_width(path)) > len(drawn) else ""
            raise UserError(
                f"--neurons {wanted}: layer {layer} has {len(drawn)} neurons{sampled}; "
                f"give a number from 1 to {len(drawn)}"
            )
        samples[layer] = drawn[:wanted]
    return samples


def _explain_layer(
    path: Path,
    layer: int,
    indices: Sequence[int],
    done: Container[int],
    waiting: Waiting[Explanation],
    ask: Callable[[Sequence[NeuronRecord]], Sequence[tuple[Explanation, UserError | None]]],
    batch: int,
) -> None:
    """Explain one layer's sample in batches that depend on the sample alone.

    Rounding differs with what else is in a batch and may turn a close choice of the model, so a batch with a missing
    neuron is asked again as a whole: an interrupted run ends with the same bytes as one that was not.
    """
    chunks = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    pending = [chunk for chunk in chunks if any(index not in done for index in chunk)]
    work = with_records(path, pending, AT_ONCE // batch + 1)
    for chunk, records in progress(work, f"explain layer {layer}", len(pending)):
        found = ask([records[index] for index in chunk])
        waiting.answered |= any(explanation.text for explanation, _ in found)
        for explanation, problem in found:
            if explanation.neuron.index not in done:
                waiting.add(explanation, problem)
