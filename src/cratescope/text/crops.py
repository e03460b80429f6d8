"""Training input: random crops, or windows packed without overlap; crop i depends on the seed and i alone.

So any rank, worker or resumed run that asks for crop i reads the same tokens, and no state has to be saved.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Dataset

from cratescope.errors import UserError
from cratescope.text.shards import TokenSplit

Sampling = Literal["random", "packed"]
ROUNDS = 4
"""Rounds of the Feistel network in `shuffled`; four of a good hash make a strong permutation (Luby and Rackoff)."""


class Crops(Dataset):
    """`length` crops of `context` tokens from `split`, as a data set of {"input_ids", "labels"}.

    sampling: `random` crops start anywhere with equal chance, as in the paper (section 3); `packed` windows share no
    token, and every epoch reads each of them once, in a new order (the last tokens, too few for a window, are never
    read). Raises UserError for a split shorter than one crop.
    """

    def __init__(self, sampling: Sampling, split: TokenSplit, context: int, seed: int, length: int) -> None:
        if split.n_tokens < context:
            raise UserError(
                f"the {split.name} split has {split.n_tokens} tokens, fewer than one crop of {context}; "
                "prepare more text or lower --context"
            )
        self.sampling, self.split, self.context, self.seed, self.length = sampling, split, context, seed, length

    def start(self, index: int) -> int:
        """Position of a crop's first token in the split."""
        if self.sampling == "random":
            return int(np.random.default_rng([self.seed, index]).integers(0, self.split.n_tokens - self.context + 1))
        windows = self.split.n_tokens // self.context
        epoch, place = divmod(index, windows)
        return shuffled(place, windows, (self.seed, epoch)) * self.context

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Int64[np.ndarray, " context"]]:
        if not 0 <= index < self.length:
            raise IndexError(f"crop {index} of {self.length}")
        tokens = self.split.window(self.start(index), self.context)
        return {"input_ids": tokens, "labels": tokens}


def shuffled(place: int, n: int, key: tuple[int, ...]) -> int:
    """Element `place` of the permutation of 0..n-1 named by `key`, computed without building the permutation.

    A Feistel network permutes the numbers below the next power of four; repeating it on a result of n or more until
    one below n comes permutes the numbers below n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = place >> bits, place & ((1 << bits) - 1)
        for number in range(ROUNDS):
            digest = blake2b(f"{key} {number} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & ((1 << bits) - 1))
        place = left << bits | right
        if place < n:
            return place
