"""A language model run here by transformers: a hub name, a folder, a .gguf file, or the offline kit's SmolLM2."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cratescope.config import LLMConfig
from cratescope.hardware import pick_device, pick_dtype
from cratescope.neurons.llm import Ids
from cratescope.run import UserError


class LocalLLM:
    """A causal model and its tokenizer. The last prefix's keys and values are kept and shared by a whole batch.

    Prompts of a batch are padded on the left, between prefix and prompt, and masked, so that every prompt ends in the
    last column; positions count real tokens only.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.context = model.config.get_text_config().max_position_embeddings
        self._bos: list[int] = tokenizer("").input_ids[:1]
        spaced = tokenizer.convert_ids_to_tokens(_encode(tokenizer, "x"))[0] != "x"
        self._newline = _encode(tokenizer, "\n") if spaced else []
        self._prefix: tuple[int, ...] = ()
        self._cache = DynamicCache()

    @classmethod
    def open(cls, config: LLMConfig) -> LocalLLM:
        """Load `config.llm`. Raises UserError when it is neither on the hub nor a model on this disk."""
        source, options = _source(config.llm)
        device = pick_device(config.llm_device)
        dtype = pick_dtype(config.llm_dtype, device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            fix = "give `offline`, a hub name, a model folder or a .gguf file"
            raise UserError(f"--llm {config.llm}: cannot load it ({reason}); {fix}") from error
        return cls(model.to(device), tokenizer, config.llm)

    def encode(self, text: str) -> list[int]:
        # A SentencePiece tokenizer puts a space before any text; behind a newline it does not reach ours.
        behind = _encode(self.tokenizer, "\n" + text) if self._newline else []
        if behind and behind[: len(self._newline)] == self._newline:
            return behind[len(self._newline) :]
        return _encode(self.tokenizer, text)

    @torch.inference_mode()
    def generate(self, prefix: Ids, prompts: Sequence[Ids], max_new_tokens: int, stop: str) -> list[str]:
        cache, ids, mask = self._batch(prefix, prompts, max_new_tokens)
        written: list[list[int]] = [[] for _ in prompts]
        texts: list[str | None] = [None] * len(prompts)
        for _ in range(max_new_tokens):
            tokens = self._logits(cache, ids, mask, [[ids.shape[1] - 1]] * len(prompts)).argmax(-1)
            for row, token in enumerate(tokens.tolist()):
                written[row].append(token)
                if texts[row] is None:
                    texts[row] = self._finished(written[row], stop)
            if None not in texts:
                break
            ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        return [self._decode(row) if text is None else text for row, text in zip(written, texts, strict=True)]

    @torch.inference_mode()
    def next_logprobs(self, prefix: Ids, prompts: Sequence[Ids]) -> Float[np.ndarray, "n vocab"]:
        cache, ids, mask = self._batch(prefix, prompts)
        logits = self._logits(cache, ids, mask, [[ids.shape[1] - 1]] * len(prompts))
        return logits.log_softmax(-1).cpu().numpy()

    @torch.inference_mode()
    def slot_logprobs(
        self, prefix: Ids, prompts: Sequence[Ids], slots: Sequence[Ids], choices: Ids
    ) -> list[Float[np.ndarray, "slots choices"]]:
        if any(slot < 1 for row in slots for slot in row):
            raise ValueError("a slot must have a token of its own prompt before it")
        cache, ids, mask = self._batch(prefix, prompts)
        pad = [ids.shape[1] - len(prompt) for prompt in prompts]
        # The distribution of the token at a slot is read one position before it.
        where = [[left + slot - 1 for slot in row] for left, row in zip(pad, slots, strict=True)]
        logits = self._logits(cache, ids, mask, where)
        chosen = logits.log_softmax(-1)[:, list(choices)].cpu().numpy()
        return np.split(chosen, np.cumsum([len(row) for row in slots])[:-1])

    def _batch(
        self, prefix: Ids, prompts: Sequence[Ids], room: int = 0
    ) -> tuple[DynamicCache, Int[Tensor, "n t"], Int[Tensor, "n seen"]]:
        """The prefix's cache repeated for every prompt, the left-padded prompts, and the mask over both."""
        width = max(len(prompt) for prompt in prompts)
        needed = len(self._bos) + len(prefix) + width + room
        if needed > self.context:
            raise UserError(
                f"--llm {self.name}: a prompt needs {needed} tokens and the model reads {self.context}; "
                "choose a model with a longer context"
            )
        cache = copy.deepcopy(self._prefix_cache(tuple(prefix)))
        cache.batch_repeat_interleave(len(prompts))
        device = self.model.device
        ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        mask = torch.ones(len(prompts), cache.get_seq_length() + width, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, mask.shape[1] - width : mask.shape[1] - len(prompt)] = 0
        return cache, ids, mask

    def _prefix_cache(self, prefix: tuple[int, ...]) -> DynamicCache:
        if prefix != self._prefix or not self._cache.get_seq_length():
            self._prefix, self._cache = prefix, DynamicCache(config=self.model.config)
            ids = torch.tensor([self._bos + list(prefix)], device=self.model.device)
            self._logits(self._cache, ids, torch.ones_like(ids), [[ids.shape[1] - 1]])
        return self._cache

    def _logits(
        self, cache: DynamicCache, ids: Int[Tensor, "n t"], mask: Int[Tensor, "n seen"], where: Sequence[Ids]
    ) -> Float[Tensor, "m vocab"]:
        """Run `ids` behind `cache` (which grows) and return float32 logits at column `where[row]` of every row.

        The head is the largest matrix of a small model, so its input is cut down to the wanted places; a hook does it
        because what a model does to its logits afterwards (scaling, soft caps) is its own affair.
        """
        rows = [row for row, columns in enumerate(where) for _ in columns]
        columns = [column for row in where for column in row]
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _module, inputs: (inputs[0][rows, columns][None],)
        )
        try:
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        finally:
            hook.remove()
        return out.logits[0].float()

    def _finished(self, ids: list[int], stop: str) -> str | None:
        """The text when `ids` end it (by an end-of-text token or by `stop`), else None."""
        ends = self.model.generation_config.eos_token_id
        if ids[-1] in (ends if isinstance(ends, list) else [ends, self.tokenizer.eos_token_id]):
            return self._decode(ids[:-1])
        text = self._decode(ids)
        return text.split(stop)[0] if stop in text else None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _encode(tokenizer: Any, text: str) -> list[int]:
    # Text of the corpus may hold a special token's name; in a prompt it is ordinary text.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def _source(name: str) -> tuple[str, dict[str, str]]:
    """What to give from_pretrained: a name or folder, and the file inside it for a .gguf."""
    if name == "offline":
        from cratescope.lm.offline import smollm2_folder

        return str(smollm2_folder()), {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--llm {name}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    return name, {}
