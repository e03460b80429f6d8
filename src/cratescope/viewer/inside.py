"""What a page needs to run a model by itself: its shape, its weights as float16, and its tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float16
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.models.folder import longest_context, model_config
from cratescope.models.sae import SparseCoder
from cratescope.neurons.sites import BUILT_IN
from cratescope.progress import progress, say
from cratescope.run import Run
from cratescope.text.encoding import cuts_like_gpt2
from cratescope.viewer.loaded import Loaded, Models, Place
from cratescope.viewer.opened import Opened
from cratescope.viewer.packed import Json, Scripts

LARGEST = 20_000_000
"""Numbers of the largest model that a page is given: 40 MB of float16, 55 MB as text."""
PART = 1 << 19
"""Numbers in one script: a page that reads them stays responsive."""
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh")
"""Activation functions of GPT-2 that the page has."""
OPEN = "open it with `cratescope view`"
NO_HALF = f"float16 cannot hold; {OPEN}"
NEURONS = "neurons"
PLACES = {"codes": NEURONS, "mlp": NEURONS}
"""Where a site is in the page's models, by its name in `BUILT_IN`; the others have the same name."""
Tensors = dict[str, Float16[np.ndarray, "..."]]


@dataclass(frozen=True)
class Inside:
    """A model, or a sparse autoencoder, as the page takes it: what it is, and its numbers by name."""

    about: dict[str, Any]
    tensors: Tensors

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def fits(self) -> bool:
        """Whether float16 can hold all numbers."""
        return all(np.isfinite(tensor).all() for tensor in self.tensors.values())


def refusal(run: Run) -> str | None:
    """Why a page cannot run this run's model, in one sentence; None where it can. The weights are not read."""
    if not (run.model / "config.json").is_file():
        return "This run has no model; its records were imported."
    config = model_config(run.model)
    if reason := _unknown_shape(config):
        return f"{reason} Open it with `cratescope view`, which runs any model."
    if not cuts_like_gpt2(run.tokenizer.backend_tokenizer):
        return "Pages have byte-level BPE tokenizers only, and this model's is another. Open it with `cratescope view`."
    return None


def _unknown_shape(config: Any) -> str | None:
    if config.model_type not in ("crate", "gpt2"):
        return f"Pages run CRATE and GPT-2 only, and this is a {config.model_type} model."
    if config.model_type == "gpt2" and config.activation_function not in ACTIVATIONS:
        return f"Pages do not have the activation function {config.activation_function} of this model."
    blocks = {"attention": "mssa", "lag": False, "bilinear": False, "feed_forward": "ista"}
    blocks |= {"ista_step_learned": False, "ista_gain": False}
    if changed := [name for name, value in blocks.items() if getattr(config, name, value) != value]:
        return f"Pages run CRATE with the blocks of the paper, and this one has others ({', '.join(changed)})."
    other = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    changed = [name for name, value in other.items() if getattr(config, name, value) != value]
    if changed:
        return f"This GPT-2 is not the usual one ({', '.join(changed)})."
    size = _numbers(config)
    return f"This model has {size:,} weights, pages run up to {LARGEST:,}." if size > LARGEST else None


def _numbers(config: Any) -> int:
    """Weights of a model of this shape, but for the small ones of norms and biases."""
    d = config.n_embd
    if config.model_type == "crate":
        block = 2 * d**2 + config.n_atoms * d * (1 if config.ista_tied else 2)
    else:
        block = 4 * d**2 + 2 * (config.n_inner or 4 * d) * d
    heads = 1 if config.tie_word_embeddings else 2
    return config.n_layer * block + (heads * config.vocab_size + config.n_positions) * d


def inside(model: PreTrainedModel) -> Inside:
    """A model that `refusal` has nothing against."""
    weights = {key: tensor.detach().float() for key, tensor in model.state_dict().items()}
    config: Any = model.config
    of = _of_crate if config.model_type == "crate" else _of_gpt2
    tensors = dict(_shared(weights, config)) | dict(of(weights, config))
    about = _shape(config) | {"tied": "head" not in tensors, "end": _end(model)}
    return Inside(about, {key: _half(tensor) for key, tensor in tensors.items()})


def _shape(config: Any) -> dict[str, Any]:
    crate = config.model_type == "crate"
    about = {
        **{"family": config.model_type, "vocabulary": config.vocab_size, "context": longest_context(config)},
        **{"width": config.n_embd, "heads": config.n_head, "layers": config.n_layer, "eps": config.layer_norm_epsilon},
        "neurons": config.n_atoms if crate else config.n_inner or 4 * config.n_embd,
    }
    if not crate:
        return about | {"activation": config.activation_function}
    names = {"steps": "steps", "step_size": "step_size", "penalty": "lambda", "skip": "skip", "tied": "tied"}
    return about | {"ista": {name: getattr(config, f"ista_{theirs}") for name, theirs in names.items()}}


def _end(model: Any) -> list[int]:
    """Tokens that end a text."""
    end = model.generation_config.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]


def _shared(weights: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    yield "wte", weights["transformer.wte.weight"]
    yield "wpe", weights["transformer.wpe.weight"]
    if not config.tie_word_embeddings:
        yield "head", weights["lm_head.weight"]
    norms = [("ln_f", "ln_f"), *((f"{n}.{one}", f"h.{n}.{one}") for n in range(config.n_layer) for one in NORMS)]
    for name, theirs in norms:
        for part in ("weight", "bias"):
            yield f"{name}.{part}", weights[f"transformer.{theirs}.{part}"]


NORMS = ("ln_1", "ln_2")


def _of_crate(weights: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    """As `Model` in page/model.js calls them: matrices (outputs, inputs), dictionaries an atom a row."""
    names = {"U": "mssa.U.weight", "W": "mssa.W.weight", "W.bias": "mssa.W.bias", "D": "ista.D"}
    names |= {} if config.ista_tied else {"D_out": "ista.D_out"}
    for layer in range(config.n_layer):
        for name, theirs in names.items():
            yield f"{layer}.{name}", weights[f"transformer.h.{layer}.{theirs}"]


def _of_gpt2(weights: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    """transformers keeps the matrices of GPT-2 the other way round: (inputs, outputs)."""
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        parts = zip("qkv", weights[f"{block}.attn.c_attn.weight"].T.chunk(3), strict=True)
        biases = zip("qkv", weights[f"{block}.attn.c_attn.bias"].chunk(3), strict=True)
        yield from ((f"{layer}.{name}", part) for name, part in parts)
        yield from ((f"{layer}.{name}.bias", part) for name, part in biases)
        yield f"{layer}.out", weights[f"{block}.attn.c_proj.weight"].T
        yield f"{layer}.in", weights[f"{block}.mlp.c_fc.weight"].T
        yield f"{layer}.back", weights[f"{block}.mlp.c_proj.weight"]  # a neuron a row
        for name, theirs in (("out", "attn.c_proj"), ("in", "mlp.c_fc"), ("back", "mlp.c_proj")):
            yield f"{layer}.{name}.bias", weights[f"{block}.{theirs}.bias"]


def _half(tensor: Tensor) -> Float16[np.ndarray, ...]:
    return np.ascontiguousarray(tensor.detach().half().numpy())


def places(family: str) -> dict[str, str]:
    """Where each site that has a name is in the page's models; the native one first."""
    return {name: PLACES.get(name, name) for name in BUILT_IN[family]}


def place_of(family: str, pattern: str) -> str | None:
    """Where a site of this module path is in the page's models; None where they do not show it."""
    return next((place for name, place in places(family).items() if BUILT_IN[family][name] == pattern), None)


def coder_inside(coder: SparseCoder) -> Inside:
    """A sparse autoencoder."""
    config = coder.config
    about = {"kind": config.kind, "width": config.width, "d": config.d_in, "k": config.k}
    names = ("encoder", "encoder_bias", "decoder", "bias", "threshold")
    return Inside(about, {name: _half(getattr(coder, name)) for name in names})


def tokenizer_inside(backend: Tokenizer) -> dict[str, Any]:
    """A tokenizer that `cuts_like_gpt2` holds for, as page/tokenizer.js takes it."""
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    pieces: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for piece, index in vocabulary.items():
        pieces[index] = piece
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in state["model"]["merges"]]
    return {
        "pieces": pieces,
        "merges": [state["model"]["vocab"][part] for merge in merges for part in merge],
        "special": sorted(token["id"] for token in state["added_tokens"]),
        **{name: [*map(int, _steps(kind))] for name, kind in (("letters", "a"), ("digits", "1"))},
    }


@functools.cache
def _steps(kind: str) -> np.ndarray:
    """Code points of a class of GPT-2's pattern, as gap and length of one run after the other.

    The pattern itself is asked, since classes differ between versions of Unicode: a character is in the class of `kind`
    where the two are one piece.
    """
    member = np.zeros(0x110000, dtype=bool)
    for first in range(0, ASSIGNED, BLOCK):
        points = [point for point in range(first, first + BLOCK) if not 0xD800 <= point < 0xE000]
        member[points] = _members(kind, points)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], member, [False]]).astype(np.int8)))
    return np.diff(np.concatenate([[0], edges]))


BLOCK = 256
ASSIGNED = 0x40000
"""Above it there are only tags, variation selectors and private characters, which are neither letters nor digits."""


def _members(kind: str, points: list[int]) -> list[bool]:
    """Which code points are in a class; a block that is in one class as a whole is asked in one piece."""
    cut = _pattern().pre_tokenize_str
    text = "".join(map(chr, points))
    for one in ("!", "a", "1"):
        if len(cut(one + text)) == 1:
            return [one == kind] * len(points)
    found = dict.fromkeys((place[0] for _, place in cut("".join(f"\n{kind}{character}" for character in text))), True)
    # Pieces that begin at a newline, at `kind`, and at the character where it is in another class.
    return [3 * place + 2 not in found for place in range(len(points))]


@functools.cache
def _pattern() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False)


class ModelScripts:
    """Writes one run's model, its tokenizer, and the sparse autoencoders that its sites need."""

    def __init__(self, scripts: Scripts, opened: Opened, loaded: Loaded) -> None:
        self.scripts, self.opened, self.loaded = scripts, opened, loaded
        self.whole = inside(loaded.model)
        self.room = LARGEST - self.whole.size

    @classmethod
    def of(cls, scripts: Scripts, opened: Opened, models: Models) -> Json | str:
        """What the manifest says of the model, or why the page has none."""
        if opened.can_run is not True:
            return str(opened.can_run)
        try:
            if reason := refusal(opened.run):
                return reason
            made = cls(scripts, opened, models.of(opened))
        except UserError as error:  # it may name folders of this machine, so it is not for the page
            say(f"warning: {opened.name} is exported without its model: {error}", "yellow")
            return "This run's model could not be loaded when the page was exported."
        return made.write() if made.whole.fits else f"This model has weights that {NO_HALF}."

    def write(self) -> Json:
        family = self.whole.about["family"]
        named = places(family)
        sites: dict[str, Json] = {name: {"place": place, "coders": None} for name, place in named.items()}
        problems, found = [*self.loaded.problems], list[Json]()
        for one in self.loaded.places:
            where = place_of(family, one.site.pattern)
            coder = self._coder(one) if where else f"{one.name} is not read inside this page; {OPEN}"
            if where is None or isinstance(coder, str):
                problems.append(str(coder))
                continue
            if coder:
                sites.setdefault(one.name, {"place": where, "coders": {}})["coders"][str(one.layer)] = len(found)
            found.append(self._place(one, where, coder))
        about = {"tokenizer": self._tokenizer(), "native": next(iter(named)), "sites": sites, "places": found}
        return self._numbers(self.whole, "model", self.opened.name) | about | {"problems": [*dict.fromkeys(problems)]}

    def _place(self, one: Place, where: str, coder: Json | None) -> Json:
        about = self.whole.about
        wide = about["neurons"] if where in ("neurons", "first_codes") else about["width"]
        return {
            "site": one.name,
            "layer": one.layer,
            "place": where,
            "coder": coder,
            "width": coder["about"]["width"] if coder else wide,
            "recorded": one.units is not None,
        }

    def _coder(self, one: Place) -> Json | str | None:
        """The place's autoencoder, if it is of one; or why the page has it not."""
        coder = getattr(one.site, "coders", {}).get(one.layer)
        if coder is None:
            return None
        found = coder_inside(coder)
        if not found.fits:
            return f"{one.name} of layer {one.layer} has numbers that {NO_HALF}"
        if found.size > self.room:
            return f"{one.name} of layer {one.layer} is too large for this page; {OPEN}"
        self.room -= found.size
        return self._numbers(found, "coder", self.opened.name, one.name, one.layer)

    def _numbers(self, of: Inside, *name: object) -> Json:
        """Write the numbers of a model or an autoencoder."""
        flat = np.concatenate([tensor.ravel() for tensor in of.tensors.values()])
        parts = [flat[start : start + PART].tobytes() for start in range(0, len(flat), PART)]
        names = [
            self.scripts.put(part, *name, f"{number:02d}")
            for number, part in enumerate(progress(parts, " ".join(map(str, name))))
        ]
        tensors = [[key, tensor.size] for key, tensor in of.tensors.items()]
        return {"about": of.about, "tensors": tensors, "parts": names, "size": len(flat)}

    def _tokenizer(self) -> str:
        """The name of its script; models of one tokenizer share it."""
        value = tokenizer_inside(self.opened.run.tokenizer.backend_tokenizer)
        return self.scripts.put_once(value, "tokenizer", self.opened.name)
