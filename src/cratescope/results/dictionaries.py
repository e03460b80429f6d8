"""The sparse autoencoders of a run: what they are and how good, read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cratescope.errors import UserError
from cratescope.files import Shape, misfit, read_json
from cratescope.neurons.sample import SAE
from cratescope.run import Run

if TYPE_CHECKING:
    from cratescope.models.sae import CoderConfig, Origin

Row = dict[str, Any]
WITH_ERRORS = (
    *("l0", "explained_variance", "mse", "loss_recovered_zero", "loss_recovered_mean"),
    *("kl", "kl_recovered_zero", "kl_recovered_mean"),
)
PLAIN = ("loss", "loss_replaced", "loss_zero", "loss_mean", "dead", "decoder_cosine")
NUMBERS = (*(name + end for name in WITH_ERRORS for end in ("", "_error")), *PLAIN)
"""What is measured of an autoencoder of one layer; null where there is no such number."""
PROBING = ("chance", "k1", "k1_error", "k5", "k5_error")
"""Accuracy of linear probes on the best feature, and on the best five; null if it was not measured."""
_NUMBER: Shape = (float, None)
_LAYER: Shape = {
    **{"layer": int, "kind": str, "width": int, "density": {"edges": [float], "counts": [int]}},
    **{name: _NUMBER for name in NUMBERS},
}
QUALITY: Shape = {"layers": [_LAYER]}
"""What is read of RUN/saes/NAME/quality.json; densities are log10 of shares of tokens, edges rising."""
MAKER = "`cratescope evaluate --sae`"


@dataclass(frozen=True)
class Dictionary:
    """The sparse autoencoders of one name of a run.

    name: of their folder. coders: what they are, and of which activations, by layer. quality: a row of NUMBERS per
    layer, empty if it was not measured.
    """

    name: str
    coders: Mapping[int, tuple[CoderConfig, Origin]]
    quality: list[Row]

    @property
    def site(self) -> str:
        return f"{SAE}{self.name}"

    @property
    def config(self) -> CoderConfig | None:
        """What the autoencoders of all layers are; None where they differ, or are gone."""
        found = {config for config, _ in self.coders.values()}
        return found.pop() if len(found) == 1 else None

    @property
    def pattern(self) -> str | None:
        """The module whose activations they are of, with {layer}; None as for `config`."""
        found = {origin.pattern for _, origin in self.coders.values()}
        return found.pop() if len(found) == 1 else None


def read_dictionaries(run: Run) -> list[Dictionary]:
    """Every dictionary of a run, by name. Raises UserError: a damaged cfg.json or quality.json."""
    folders = sorted(path for path in (run.root / "saes").glob("[!.]*") if path.is_dir())
    found = [Dictionary(folder.name, _coders(folder), _quality(folder / "quality.json")) for folder in folders]
    return [one for one in found if one.coders or one.quality]


def _coders(folder: Path) -> dict[int, tuple[CoderConfig, Origin]]:
    from cratescope.models.sae import CONFIG, read_config  # loads PyTorch, which results do without

    paths = sorted(folder.glob(f"layer-*/{CONFIG}"))
    return {int(path.parent.name.removeprefix("layer-")): read_config(path.parent) for path in paths}


def _quality(path: Path) -> list[Row]:
    if not path.exists():
        return []
    rows: list[Row] = read_json(path, QUALITY, MAKER)["layers"]
    for row in rows:
        edges, counts, probing = row["density"]["edges"], row["density"]["counts"], row.get("probing")
        wrong = misfit(probing, dict.fromkeys(PROBING, _NUMBER), "probing") if probing is not None else None
        if len(edges) != len(counts) + 1 or edges != sorted(set(edges)):
            wrong = "the edges of density do not fit its counts"
        if wrong:
            raise UserError(f"{path}: damaged ({wrong}); delete it and run {MAKER} again")
    return sorted(rows, key=lambda row: row["layer"])
