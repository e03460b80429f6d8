"""Texts that a model writes after neutral beginnings while one neuron is forced, for judging what a neuron does.

Every text of a layer begins alike and is drawn by the same random numbers, so two texts differ by their neurons alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from cratescope.errors import UserError
from cratescope.lm.load import load_model
from cratescope.models.folder import longest_context
from cratescope.neurons.coded import recorded_site
from cratescope.neurons.kept import Kept, item_of, row_of, schema
from cratescope.neurons.records import NeuronId, layer_file, read_columns
from cratescope.neurons.sample import records_identity
from cratescope.neurons.sites import Site, hooked
from cratescope.parts import Tables
from cratescope.progress import progress
from cratescope.run import Run, claim
from cratescope.text.tokenizer import encode

VERSION = 1
"""Of how texts are written: raise it when the same neurons write others."""
BEGINNINGS = (
    *("We found that", "Some people say", "After a while", "This is", "In the end", "They told us that", "It was"),
    *("There are", "I think", "Later on"),
)
TOKENS = 24
"""Tokens of a text after its beginning."""
LEAST = 4
AT_ONCE = 64
"""Neurons that write in one pass, a row each."""


@dataclass(frozen=True)
class Written:
    """What a model wrote with one neuron set to `value` at every token: a text for each of `BEGINNINGS`.

    Texts hold their beginning. No texts for a neuron that is never active: it has no strength of its own.
    """

    neuron: NeuronId
    value: float
    texts: tuple[str, ...]


def kept_texts(run: Run, site: str) -> Kept[Written]:
    """The tables of texts, one per layer with a row per neuron."""
    columns = schema(("value", pa.float64()), ("texts", pa.list_(pa.string())))
    return Kept(
        Tables(run.root / "steered" / run.records(site).name, columns, "judge --scorer output"),
        lambda item: [row_of(item)],
        lambda rows: item_of(Written, rows[0] | {"texts": tuple(rows[0]["texts"])}),
    )


def texts_identity(run: Run, site: str, strength: float) -> dict[str, Any]:
    """What decides the texts."""
    made_with = {"strength": strength, "beginnings": [*BEGINNINGS], "tokens": TOKENS, "written_version": VERSION}
    return made_with | records_identity(run, site)


def write_texts(run: Run, site: str, layer: int, indices: Sequence[int], strength: float) -> dict[int, Written]:
    """Texts of these neurons of a layer, in their order, set to `strength` times their maximum in the records.

    Texts that are there are kept; the others are written now.

    Raises:
        UserError: texts of another strength or model; a model that does not write text, or too little at once.
    """
    kept = kept_texts(run, site)
    claim(kept.folder, texts_identity(run, site, strength))
    table = read_columns(layer_file(run.records(site), layer), ["index", "maximum", "dead"], sorted(indices))
    maxima = {row["index"]: row["maximum"] for row in table.to_pylist() if row["maximum"] > 0 and not row["dead"]}
    wanted = [index for index in indices if index in maxima]
    chunks = [wanted[start : start + AT_ONCE] for start in range(0, len(wanted), AT_ONCE)]
    done = kept.done(layer)
    if pending := [chunk for chunk in chunks if not done.issuperset(chunk)]:
        writer = _Writer(run, site, layer)
        with kept.writing() as keep:
            for chunk in progress(pending, f"steered texts {run.name} layer {layer}"):
                for item in writer.of(chunk, [strength * maxima[index] for index in chunk]):
                    keep(item)
    found = kept.read(layer, wanted)
    return {index: found[index] for index in wanted}


class _Writer:
    """A layer's neurons, forced while the model writes."""

    def __init__(self, run: Run, site: str, layer: int) -> None:
        self._run, self._layer = run, layer
        self._model: Any = load_model(run, "auto")
        self._site = recorded_site(run, site)
        if not self._model.can_generate():
            raise UserError(
                f"a {self._model.config.model_type} model does not write text; give a causal language model"
            )

    def of(self, chunk: Sequence[int], values: Sequence[float]) -> list[Written]:
        """A row for each neuron, one beginning after another."""
        rows = [self._rows(number, text, chunk, values) for number, text in enumerate(BEGINNINGS)]
        return [
            Written(NeuronId(self._run.name, self._site.name, self._layer, index), value, texts)
            for index, value, *texts_of in zip(chunk, values, *rows, strict=True)
            for texts in [tuple(texts_of)]
        ]

    def _rows(self, number: int, text: str, chunk: Sequence[int], values: Sequence[float]) -> list[str]:
        [ids] = encode(self._run.tokenizer, [text])
        longest = longest_context(self._model.config)
        n = min(TOKENS, longest - len(ids)) if longest else TOKENS
        if n < LEAST:
            raise UserError(f"this model reads {longest} tokens at once, too few to write a text after {text!r}")
        tokens = torch.tensor([ids] * len(chunk), device=self._model.device)
        found = forced_text(self._model, self._site, self._layer, tokens, (chunk, values), n, number)
        return [str(self._run.tokenizer.decode(row)) for row in found]


class _SameNoise(LogitsProcessor):
    """Makes the likeliest token one that is drawn by chances, with the same random numbers in every row.

    Adding a Gumbel variable to each logit and taking the largest draws from their softmax. The end of the text is never
    drawn.
    """

    def __init__(self, seed: int, never: Sequence[int]) -> None:
        self._random, self._never = torch.Generator().manual_seed(seed), [*never]

    def __call__(self, input_ids: Int64[Tensor, "n t"], scores: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        noise = torch.rand(scores.shape[-1], generator=self._random, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
        drawn = scores.float() - (-noise.log()).log().float().to(scores.device)
        drawn[:, self._never] = -torch.inf
        return drawn


@torch.no_grad()
def forced_text(
    model: PreTrainedModel,
    site: Site,
    layer: int,
    tokens: Int64[Tensor, "n t"],
    neurons: tuple[Sequence[int], Sequence[float]],
    n: int,
    seed: int,
) -> Int64[Tensor, "n s"]:
    """The tokens and n more of each row, in which one neuron is set to a value at every token.

    neurons: index and value of each row's.
    """
    index, value = torch.tensor(neurons[0], device=tokens.device), torch.tensor(neurons[1], device=tokens.device)
    rows = torch.arange(len(tokens), device=tokens.device)

    def visit(_layer: int, x: Float[Tensor, "n t m"]) -> Float[Tensor, "n t m"]:
        x = x.clone()
        x[rows, :, index] = value.to(x.dtype)[:, None]
        return x

    generator: Any = model
    end = generator.generation_config.eos_token_id
    never = [] if end is None else end if isinstance(end, list) else [end]
    settings = GenerationConfig(max_new_tokens=n, do_sample=False, pad_token_id=0)
    generator.generation_config = settings  # what the folder says of sampling would be filled in
    with hooked(model, site, [layer], visit):
        found: Tensor = generator.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_SameNoise(seed, [one for one in never if one < _width(model)])]),
        )
    return found


def _width(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return len(embeddings.weight)
