"""The models of the runs that were opened, loaded when they are first run, with every site that has records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.files import SURROGATES
from cratescope.lm.head import plain_pass
from cratescope.lm.load import load_model
from cratescope.models.folder import longest_context
from cratescope.neurons.coded import find_coders
from cratescope.neurons.sample import SAE
from cratescope.neurons.sites import Site, hooked, site_named
from cratescope.text.tokenizer import encode
from cratescope.viewer.opened import Opened, OpenedSite, Units

AGAIN = "collect them again"
LONGEST_TEXT = 20_000
"""Characters of a text that is read."""
MOST_TOKENS = 4096
"""Tokens that are read of a text by a model that states no longest context."""


@dataclass(frozen=True, eq=False)
class Place:
    """One layer of one site of a model, and its records where they are of this model.

    opened: the site's records; None where there are none of this model. units: of this layer; None likewise.
    """

    name: str
    site: Site
    layer: int
    opened: OpenedSite | None

    @property
    def units(self) -> Units | None:
        """The units that there are records of."""
        there = self.opened is not None and self.layer in self.opened.layers
        return self.opened.units(self.layer) if there and self.opened else None


class Loaded:
    """A run's model, ready to run. `problems` says why records of a site are not used."""

    def __init__(self, opened: Opened, device: str = "cpu") -> None:
        """Raises UserError: no model, or one that cannot be loaded."""
        if opened.can_run is not True:
            raise UserError(f"{opened.name}: {opened.can_run}")
        self.opened = opened
        self.model: PreTrainedModel = load_model(opened.run, device)
        self.problems: list[str] = []
        self.places = self._places()

    @property
    def context(self) -> int:
        """The most tokens that are read at once."""
        return longest_context(self.model.config) or MOST_TOKENS

    @cached_property
    def fingerprint(self) -> str:
        return self.opened.run.fingerprint()

    def ids(self, text: str) -> list[int]:
        """The tokens of a text. UserError: none, too many, or some that the model does not have."""
        if len(text) > LONGEST_TEXT:
            raise UserError(f"the text has {len(text):,} characters; give at most {LONGEST_TEXT:,}")
        if SURROGATES.search(text):
            raise UserError("the text has half of a surrogate pair; leave it out")
        [ids] = encode(self.opened.run.tokenizer, [text])
        if not ids:
            raise UserError("the text has no token; give some text")
        if len(ids) > self.context:
            raise UserError(
                f"the text has {len(ids):,} tokens, {self.opened.name} reads at most {self.context:,} at once; "
                "give less"
            )
        embeddings: Any = self.model.get_input_embeddings()
        rows = embeddings.weight.shape[0]
        if max(ids) >= rows:
            raise UserError(
                f"{self.opened.name}: its tokenizer has token {max(ids)}, its model only {rows}; put the tokenizer "
                "that it was trained with into its folder model"
            )
        return ids

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> tuple[Float[Tensor, "t v"], dict[int, Float[np.ndarray, "t h"]]]:
        """Log-probabilities of what comes after each token, and the activations of every place, by its number."""
        found: dict[int, Float[np.ndarray, "t h"]] = {}

        def keep(number: int, layer: int, activations: Tensor) -> None:
            found[number] = activations[0].float().cpu().numpy()

        with self._hooks(keep):
            logits = plain_pass(self.model, torch.tensor([list(ids)], device=self.model.device)).logits[0].float()
        return logits.log_softmax(-1).cpu(), found

    @torch.no_grad()
    def activations(self, tokens: Integer[np.ndarray, "b t"]) -> dict[int, Float[np.ndarray, "n h"]]:
        """Activations of every place, by its number, on all tokens of some texts end to end."""
        found: dict[int, Float[np.ndarray, "n h"]] = {}

        def keep(number: int, layer: int, activations: Tensor) -> None:
            found[number] = activations.flatten(0, 1).float().cpu().numpy()

        with self._hooks(keep):
            plain_pass(self.model.base_model, torch.from_numpy(tokens.astype(np.int64)).to(self.model.device))
        return found

    @contextlib.contextmanager
    def _hooks(self, keep: Callable[[int, int, Tensor], None]) -> Iterator[None]:
        """While open, `keep` sees the number of every place, its layer and its activations (b, t, h)."""
        with contextlib.ExitStack() as stack:
            for number, place in enumerate(self.places):
                stack.enter_context(hooked(self.model, place.site, [place.layer], partial(keep, number)))
            yield

    def _places(self) -> list[Place]:
        """Every layer of every site with records; without any, of the model's own site."""
        found = []
        for opened in self.opened.sites.values():
            try:
                self._check(opened)
                site = self._site(opened)
            except UserError as error:
                self.problems.append(str(error))
            else:
                found += [Place(opened.name, site, layer, opened) for layer in opened.layers]
        if not found:
            site = site_named("auto", self.model)
            found = [Place(site.name, site, layer, None) for layer in site.layers(self.model)]
        return found

    def _check(self, opened: OpenedSite) -> None:
        """Refuse records of other weights."""
        of = opened.identity.get("model_sha256")
        if of is not None and of != self.fingerprint:
            raise UserError(
                f"{self.opened.name}: records of {opened.name} are of another model than the one in its folder model; "
                f"{AGAIN}"
            )

    def _site(self, opened: OpenedSite) -> Site:
        if opened.name.startswith(SAE):
            found = find_coders(self.opened.run, opened.name.removeprefix(SAE))
            of = opened.identity.get("sae_sha256")
            if isinstance(of, dict) and any(found.identity.get(layer) != of[layer] for layer in of):
                raise UserError(f"{self.opened.name}: records of {opened.name} are of other autoencoders; {AGAIN}")
            return found
        pattern = opened.identity.get("site")
        if isinstance(pattern, str) and "{layer}" in pattern:
            return Site(opened.name, pattern)
        return site_named(opened.name, self.model)


class Models:
    """The models that were loaded, by the name of their run. To be used by one thread at a time."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._loaded: dict[str, Loaded] = {}

    def of(self, opened: Opened) -> Loaded:
        """Errors as of `Loaded`."""
        if opened.name not in self._loaded:
            self._loaded[opened.name] = Loaded(opened, self.device)
        return self._loaded[opened.name]
