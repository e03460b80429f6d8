"""Activations of a model on shuffled text, a batch at a time, never on disk.

Crops of the train split come in a random order (text/crops.py). A block of them is read, its tokens are shuffled, and
it is handed out in batches before the next one is read: the memory of one block is all it takes. A block depends on its
number alone, so a resumed run reads the block it stopped in again, and gets the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.neurons.sites import Site, check_site, partial_pass
from cratescope.neurons.streaming import refuse_not_finite
from cratescope.text.crops import Crops


def width_of(model: PreTrainedModel, site: Site, layers: Sequence[int], tokens: Int[np.ndarray, " t"]) -> int:
    """Width of a site's activations, tried on some tokens.

    Raises:
        UserError: it is not read once for every token, or the layers have several widths.
    """
    with torch.no_grad():
        seen = check_site(model, site, layers, torch.from_numpy(tokens)[None].to(model.device))
    widths = {layer: activations.shape[-1] for layer, activations in seen.items()}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{width} at layer {layer}" for layer, width in widths.items())
        raise UserError(f"site {site.name} has several widths ({listed}); give --layers of one width")
    return next(iter(widths.values()))


@dataclass(frozen=True)
class Stream:
    """Batches of activations of some layers; every batch holds tokens of many crops."""

    model: PreTrainedModel
    site: Site
    layers: list[int]
    crops: Crops
    block: int
    """Crops in a block."""
    at_once: int
    """Crops in a forward pass."""
    batch: int
    """Tokens in a batch, at most those of a block."""

    @property
    def batches_per_block(self) -> int:
        """The tokens left over at a block's end, fewer than a batch, are dropped."""
        return self.block * self.crops.context // self.batch

    def batches(self, first: int) -> Iterator[dict[int, Float[Tensor, "b d"]]]:
        """Batches from number `first` on, without end: each layer's activations of the same tokens."""
        number, skip = divmod(first, self.batches_per_block)
        while True:
            held = self.read(number)
            order = torch.randperm(self.block * self.crops.context, generator=self._chance(number))
            for place in range(skip, self.batches_per_block):
                chosen = order[place * self.batch : (place + 1) * self.batch].to(next(iter(held.values())).device)
                yield {layer: activations[chosen] for layer, activations in held.items()}
            number, skip = number + 1, 0
            held.clear()  # before the next block is read, so that memory holds one

    def read(self, number: int) -> dict[int, Float[Tensor, "n d"]]:
        """All activations of a block, in the order of the text; float32.

        Raises:
            UserError: an activation that is not a number.
        """
        first, held, filled = number * self.block, {}, 0

        def visit(layer: int, activations: Float[Tensor, "b t d"]) -> None:
            try:
                refuse_not_finite(activations, first + filled)
            except UserError as error:
                fix = "train the model again, or read it with --dtype float32"
                raise UserError(f"layer {layer}: {error}; {fix}") from error
            flat = activations.float().flatten(0, 1)
            if layer not in held:
                held[layer] = flat.new_empty(self.block * self.crops.context, flat.shape[1])
            start = filled * self.crops.context
            held[layer][start : start + len(flat)] = flat

        with torch.no_grad(), partial_pass(self.model, self.site, self.layers, visit) as run:
            while filled < self.block:
                n = min(self.at_once, self.block - filled)
                run(self._tokens(first + filled, n))
                filled += n
        return held

    def _chance(self, number: int) -> torch.Generator:
        state = np.random.SeedSequence([self.crops.seed, number]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def _tokens(self, first: int, n: int) -> Int[Tensor, "b t"]:
        rows = [
            self.crops.split.window(self.crops.start(index), self.crops.context) for index in range(first, first + n)
        ]
        return torch.from_numpy(np.stack(rows)).to(self.model.device)
