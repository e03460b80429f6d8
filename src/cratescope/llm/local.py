"""A language model run locally by transformers: a hub name, a folder, a .gguf file, or the offline SmolLM2."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Cache, DynamicCache

from cratescope.errors import UserError, as_user_error, first_line
from cratescope.hardware import pick_device, pick_dtype
from cratescope.llm.config import LLMConfig
from cratescope.llm.interface import Choices, Ids, check_slots, encode, heads, spelled
from cratescope.llm.prefix import (
    EXACT,
    PROMPT,
    ROUNDED,
    SharedPrefix,
    apart,
    empty_prefix,
    in_one_pass,
    share_prefix,
    trial_prefix,
    trial_tokens,
)
from cratescope.lm.head import UNFIT, looks_ahead, plain_pass
from cratescope.models.folder import longest_context, model_config
from cratescope.progress import say
from cratescope.text.tokenizer import named_tokenizer
from cratescope.workers import rank

KEPT = 4
"""Prefixes whose keys and values are kept, the last ones asked for."""


@dataclass(frozen=True)
class Tree:
    """A prompt with candidate tokens at some of its places: each token follows its parent (-1: the prefix).

    places: tokens after which the distribution of the next token is wanted.
    """

    ids: list[int]
    parents: list[int]
    places: list[int]

    @classmethod
    def of(cls, prompt: Ids, slots: Ids, heads: Sequence[Ids] = ((),)) -> Tree:
        """A tree that asks for the next token after every head at every slot, in this order."""
        ids, parents, places = list(prompt), list(range(-1, len(prompt) - 1)), []
        for slot in slots:
            for head in heads:
                place = slot - 1
                for token in head:
                    ids.append(token)
                    parents.append(place)
                    place = len(ids) - 1
                places.append(place)
        return cls(ids, parents, places)

    @property
    def branched(self) -> bool:
        return self.parents != list(range(-1, len(self.ids) - 1))

    def depths(self) -> list[int]:
        """Number of the tree's tokens before each token."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + 1)
        return found

    def paths(self) -> list[Tree]:
        """The same question without branches: the tree itself, or one prompt per place."""
        if not self.branched:
            return [self]
        paths = []
        for place in self.places:
            ids: list[int] = []
            while place >= 0:
                ids.insert(0, self.ids[place])
                place = self.parents[place]
            paths.append(Tree.of(ids, [len(ids)]))
        return paths


class Reread:
    """A substitute for a cache: the tokens themselves, to be read again with what follows them."""

    def __init__(self, ids: Int[Tensor, "n t"]) -> None:
        self.ids = ids

    def get_seq_length(self) -> int:
        return self.ids.shape[1]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.ids = self.ids.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Int[Tensor, " m"]) -> None:
        self.ids = self.ids[indices]


class LocalLLM:
    """A causal model and its tokenizer; the keys and values of the last few prefixes are kept.

    A model with ordinary attention runs a whole batch after one copy of the prefix, prompts padded on the right, where
    no token sees the padding: its `way` is `shared`. One with special attention (sliding windows, biases) runs as
    transformers runs it: prompts of equal length together, after `copied` prefixes. If that fails too (recurrent
    states), prefix and prompt are read again for every answer: `reread`. Trials decide which.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        quantized = getattr(model, "is_loaded_in_4bit", False)
        self.dtype = "4bit" if quantized else str(model.dtype).removeprefix("torch.")
        self.context = longest_context(model.config) or tokenizer.model_max_length
        self._bos: list[int] = tokenizer("").input_ids[:1]
        self._prefixes: dict[tuple[int, ...], Cache | Reread] = {}
        self.way: Literal["shared", "copied", "reread"] = self._tried()

    @classmethod
    def open(cls, config: LLMConfig) -> LocalLLM:
        """Load `config.llm`. UserError: neither on the hub nor a model on this disk, or no 4 bits here."""
        source, options = _source(config.llm)
        if torch.cuda.is_available():
            torch.cuda.set_device(rank(local=True))
        device = pick_device(config.llm_device)
        placed = _placed(config, device)
        try:
            if not options:
                model_config(source)
            tokenizer = named_tokenizer(source, **options)
            options |= {"trust_remote_code": False, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options, **placed)
        except Exception as error:  # what the library raises on damaged files depends on their bytes
            fix = "give `offline`, a hub name, a model folder, a .gguf file, or a server's address with its http://"
            cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
            raise UserError(f"--llm {config.llm}: cannot load it ({first_line(cause)}); {fix}") from error
        model, info = loaded
        if info["missing_keys"]:  # the library gives such weights random values
            missing = sorted(info["missing_keys"])[0]
            raise UserError(f"--llm {config.llm}: its checkpoint has no {missing}, so it is not whole; get it again")
        llm = cls(model if "device_map" in placed else model.to(device), tokenizer, config.llm)
        said = {
            "copied": "has an attention of its own, so every prompt gets a copy of the shared prefix, which is slower",
            "reread": "keeps what it has read in a way of its own, so all is read again for every answer; much slower",
        }
        if llm.way in said:
            say(f"--llm {config.llm} {said[llm.way]}")
        return llm

    def encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    @torch.inference_mode()
    def generate(self, prefix: Ids, prompts: Sequence[Ids], max_new_tokens: int, stop: str) -> list[str]:
        texts = [""] * len(prompts)
        for group in self._groups([len(prompt) for prompt in prompts]):
            found = self._continue(prefix, [prompts[row] for row in group], max_new_tokens, stop)
            for row, text in zip(group, found, strict=True):
                texts[row] = text
        return texts

    @torch.inference_mode()
    def next_logprobs(self, prefix: Ids, prompts: Sequence[Ids]) -> Float[np.ndarray, "n vocab"]:
        logits = self._logits(prefix, [Tree.of(prompt, [len(prompt)]) for prompt in prompts])
        return torch.cat(logits).log_softmax(-1).cpu().numpy()

    @torch.inference_mode()
    def slot_logprobs(
        self, prefix: Ids, prompts: Sequence[Ids], slots: Sequence[Ids], choices: Choices
    ) -> list[Float[np.ndarray, "slots choices"]]:
        check_slots(prompts, slots)
        begun = heads(choices)
        trees = [Tree.of(prompt, row, begun) for prompt, row in zip(prompts, slots, strict=True)]
        return [_choice_logprobs(logits, begun, choices) for logits in self._logits(prefix, trees)]

    def _tried(self) -> Literal["shared", "copied", "reread"]:
        """Find the fastest way to run prompts after a prefix that agrees with plain passes. UserError if none does."""
        with as_user_error(f"--llm {self.name}: fails on a few tokens", "choose another", UNFIT):
            if looks_ahead(self.model, trial_tokens(self.model)):
                raise UserError(f"--llm {self.name}: its logits depend on tokens behind; choose a causal model")
            own = in_one_pass(self.model)
            if own.isnan().any():
                raise UserError(f"--llm {self.name}: its weights give NaN; get them again, or try --llm-dtype float32")
            if share_prefix(self.model, own[0]):
                return "shared"
        ways: tuple[Literal["copied", "reread"], ...] = ("copied", "reread")
        for self.way in ways:
            if self._is_plain(own):
                return self.way
        raise UserError(
            f"--llm {self.name}: its logits are not had from a head, or depend on what else is read; choose another"
        )

    @torch.inference_mode()
    def _is_plain(self, own: Float[Tensor, "n t vocab"]) -> bool:
        """Whether prefix, prompts and next token, run separately, give the logits `own`; one row leaves midway."""
        tokens, prefix = trial_tokens(self.model), trial_prefix(self.model)
        begun = prefix + PROMPT
        bos, self._bos = self._bos, []
        try:
            rows = [Tree.of(row, range(1, PROMPT + 1)) for row in tokens[:, prefix:begun].tolist()]
            cache, found = self._start(tokens[0, :prefix].tolist(), rows)
            cache.batch_select_indices(torch.tensor([1], device=self.model.device))
            positions = torch.tensor([[begun]], device=self.model.device)
            last = self._run(cache, tokens[1:, begun:], positions, None, [[0]])
        except UNFIT:
            return False
        finally:
            self._bos = bos
            self._prefixes.clear()
        # Text that is read again has the logits of its own pass, which may depend on how many tokens are read (dots3).
        first = plain_pass(self.model, tokens[:, :begun]).logits.float() if self.way == "reread" else own
        expected = torch.cat([first[:, prefix:begun].flatten(0, 1), own[1, begun:]])
        differences = apart(torch.cat([found, last]), expected)
        # In narrow formats rounding may send a token to another expert, which changes its output completely.
        narrow = self.model.dtype.itemsize < torch.float32.itemsize
        return bool(differences.median() <= ROUNDED if narrow else differences.max() <= EXACT)

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Groups of rows that run together: all of them, or those of one length."""
        if self.way == "shared":
            return [list(range(len(lengths)))]
        return [[row for row, one in enumerate(lengths) if one == length] for length in sorted(set(lengths))]

    def _logits(self, prefix: Ids, trees: Sequence[Tree]) -> list[Float[Tensor, "places vocab"]]:
        """float32 logits of the next token at every place of every tree."""
        rows = list(trees) if self.way == "shared" else [path for tree in trees for path in tree.paths()]
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for group in self._groups([len(row.ids) for row in rows]):
            _, logits = self._start(prefix, [rows[row] for row in group])
            for row, one in zip(group, logits.split([len(rows[row].places) for row in group]), strict=True):
                found[row] = one
        return list(torch.cat(found).split([len(tree.places) for tree in trees]))

    def _start(self, prefix: Ids, rows: Sequence[Tree], room: int = 0) -> tuple[Any, Float[Tensor, "m vocab"]]:
        """Run rows after the prefix; return the cache with both in it, and the logits at the rows' places."""
        depths = [row.depths() for row in rows]
        self._check_room(len(prefix) + 1 + max(max(row) for row in depths) + room)
        known = self._prefix(tuple(prefix))
        cache = SharedPrefix(known) if self.way == "shared" else copy.deepcopy(known)
        if self.way != "shared":
            cache.batch_repeat_interleave(len(rows))
        ids, positions = (self._padded(lists) for lists in ([row.ids for row in rows], depths))
        mask = self._mask(rows) if self.way == "shared" else None
        return cache, self._run(cache, ids, positions + known.get_seq_length(), mask, [row.places for row in rows])

    def _continue(self, prefix: Ids, prompts: Sequence[Ids], max_new_tokens: int, stop: str) -> list[str]:
        """Generate greedy continuations; finished rows leave the batch."""
        cache, logits = self._start(prefix, [Tree.of(prompt, [len(prompt)]) for prompt in prompts], max_new_tokens)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        seen = torch.arange(int(lengths.max()), device=self.model.device) < lengths[:, None]
        positions = self._prefix(tuple(prefix)).get_seq_length() + lengths[:, None]
        written: list[list[int]] = [[] for _ in prompts]
        texts: dict[int, str] = {}
        rows = list(range(len(prompts)))
        for left in reversed(range(max_new_tokens)):
            tokens = logits.argmax(-1)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                written[row].append(token)
                if (text := self._finished(written[row], stop, last=not left)) is not None:
                    texts[row] = text
            keep = [place for place, row in enumerate(rows) if row not in texts]
            if not keep:
                break
            if len(keep) < len(rows):
                cache.batch_select_indices(torch.tensor(keep, device=self.model.device))
                rows = [rows[place] for place in keep]
                tokens, seen, positions = tokens[keep], seen[keep], positions[keep]
            seen = torch.cat([seen, seen.new_ones(len(rows), 1)], 1)
            mask = self._hidden(seen)[:, None, None] if self.way == "shared" else None
            logits = self._run(cache, tokens[:, None], positions, mask, [[0]] * len(rows))
            positions = positions + 1
        return [texts[row] for row in range(len(prompts))]

    def _prefix(self, prefix: tuple[int, ...]) -> Any:
        """Keys and values of the begin-of-text token, where there is one, and the prefix."""
        known = self._prefixes.pop(prefix, None)
        if known is None:
            ids = torch.tensor([self._bos + list(prefix)], dtype=torch.long, device=self.model.device)
            self._check_room(len(prefix))
            if self.way == "reread":
                known = Reread(ids)
            else:
                known = empty_prefix(self.model) if self.way == "shared" else DynamicCache(config=self.model.config)
                if ids.numel():
                    self._run(known, ids, torch.arange(ids.shape[1], device=self.model.device)[None], None, [[]])
        self._prefixes[prefix] = known
        for old in list(self._prefixes)[:-KEPT]:
            del self._prefixes[old]
        return known

    def _run(
        self,
        cache: Any,
        ids: Int[Tensor, "n t"],
        positions: Int[Tensor, "n t"],
        mask: Float[Tensor, "_ 1 t s"] | None,
        places: Sequence[Ids],
    ) -> Float[Tensor, "m vocab"]:
        """Run `ids` after `cache` (which grows) and return float32 logits at the columns `places[row]` of every row.

        The head is the largest matrix of a small model, so its input is reduced to the wanted places; a hook does it
        so that whatever the model does to its logits afterwards (scaling, soft caps) still happens.
        """
        rows = [row for row, columns in enumerate(places) for _ in columns]
        columns = [column for row in places for column in row]
        given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        if isinstance(cache, Reread):
            columns = [cache.get_seq_length() + column for column in columns]
            cache.ids = ids = torch.cat([cache.ids, ids], 1)
            given = {}
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _module, inputs: (inputs[0][rows, columns][None],)
        )
        try:
            with cache.read() if isinstance(cache, SharedPrefix) else nullcontext():
                out = self.model(input_ids=ids, **given, use_cache=bool(given))
        finally:
            hook.remove()
        return out.logits[0].float()

    def _check_room(self, needed: int) -> None:
        needed += len(self._bos)
        if needed > self.context:
            raise UserError(
                f"--llm {self.name}: a prompt needs {needed} tokens and the model reads {self.context}; "
                "choose a model with a longer context"
            )

    def _padded(self, lists: Sequence[Ids]) -> Int[Tensor, "n t"]:
        width = max(len(row) for row in lists)
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in lists], device=self.model.device)

    def _mask(self, rows: Sequence[Tree]) -> Float[Tensor, "_ 1 t t"]:
        """Mask of what a token sees in its own row: its ancestors and itself. One for all rows if none has branches."""
        width = max(len(row.ids) for row in rows)
        if not any(row.branched for row in rows):
            return self._hidden(torch.ones(1, 1, width, width, dtype=torch.bool, device=self.model.device).tril())
        seen = np.tile(np.eye(width, dtype=bool), (len(rows), 1, 1))
        for one, row in zip(seen, rows, strict=True):
            for token, parent in enumerate(row.parents):
                if parent >= 0:
                    one[token] |= one[parent]
        return self._hidden(torch.from_numpy(seen).to(self.model.device)[:, None])

    def _hidden(self, seen: Tensor) -> Tensor:
        """Convert to additive attention scores: 0 where something is seen, else -inf."""
        return torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))

    def _finished(self, ids: list[int], stop: str, last: bool) -> str | None:
        """The text when `ids` end it (by an end-of-text token, by `stop`, or as the last), else None."""
        ends = self.model.generation_config.eos_token_id
        if ids[-1] in (ends if isinstance(ends, list) else [ends, self.tokenizer.eos_token_id]):
            return self._decode(ids[:-1])
        text = self._decode(ids)
        return text.split(stop)[0] if last or stop in text else None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _choice_logprobs(
    logits: Float[Tensor, "places vocab"], begun: Sequence[Ids], choices: Choices
) -> Float[np.ndarray, "slots choices"]:
    """log P of every choice from the logits after each of its beginnings at every slot."""
    logits = logits.unflatten(0, (-1, len(begun)))
    normalisers = logits.logsumexp(-1)
    sequences = spelled(choices)
    found = logits.new_zeros(len(logits), len(sequences))
    for step in range(max(map(len, sequences))):
        which = [column for column, ids in enumerate(sequences) if len(ids) > step]
        behind = [begun.index(sequences[column][:step]) for column in which]
        tokens = [sequences[column][step] for column in which]
        found[:, which] += logits[:, behind, tokens] - normalisers[:, behind]
    return found.cpu().numpy()


def _placed(config: LLMConfig, device: torch.device) -> dict[str, Any]:
    """Number format and devices as arguments of from_pretrained."""
    placed: dict[str, Any] = {"dtype": pick_dtype(config.llm_dtype, device)}
    if config.llm_device_map == "auto":
        placed["device_map"] = "auto"
    if config.llm_quantize == "4bit":
        if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
            package = "the bitsandbytes package (pip install bitsandbytes)"
            missing = "a CUDA device" if device.type != "cuda" else package
            raise UserError(f"--llm-quantize 4bit needs {missing}; leave it out, or give a 4-bit .gguf file")
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": placed["dtype"]}
        placed["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **settings)
        placed.setdefault("device_map", {"": device})
    return placed


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Arguments of from_pretrained: a name or folder, and the file inside it for a .gguf."""
    if name == "offline":
        from cratescope.text.offline import smollm2_folder

        return str(smollm2_folder()), {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--llm {name}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    return name, {}
