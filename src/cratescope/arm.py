"""Arms: the kind of model in a run, as its run.json says. Results, comparisons and colours are grouped by arm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TITLES = {
    **{"crate": "CRATE", "crate-lag": "CRATE + lag", "crate-h": "CRATE-H", "crate-h-lag": "CRATE-H + lag"},
    **{"gpt2": "GPT-2", "gpt2-lag": "GPT-2 + lag", "gpt2-h": "GPT-2-H", "gpt2-h-lag": "GPT-2-H + lag"},
}
_BUILT_IN = {
    **{"crate": ("mssa", "ista", "codes"), "crate-lag": ("mssa + lag", "ista", "codes")},
    **{"crate-h": ("mssa", "lista", "codes"), "crate-h-lag": ("mssa + lag", "lista", "codes")},
    **{"gpt2": ("mhsa", "mlp", "mlp"), "gpt2-lag": ("mhsa + lag", "mlp", "codes")},
    **{"gpt2-h": ("mhsa", "lista", "codes"), "gpt2-h-lag": ("mhsa + lag", "lista", "codes")},
}
"""Attention, feed-forward block and native site of the families that are trained here (models/presets.py)."""


@dataclass(frozen=True)
class Arm:
    """One kind of model, its size and how it was trained.

    attention: mssa, mhsa + lag or the like. feed_forward: ista, lista, mlp or the like. size: `2l` for the paper's
    two-layer models, `6L-82M` (layers and parameters) for an adopted one. site: where its neurons are unless another is
    asked for. seed, tokens_trained: None where unknown, as for an adopted model. variant: what differs from the preset.
    """

    family: str
    attention: str
    feed_forward: str
    size: str
    site: str
    seed: int | None
    tokens_trained: int | None
    variant: str = ""

    @property
    def name(self) -> str:
        """`crate`, or `crate ista_steps=3` for a variant: runs of one name are replicates of each other."""
        return f"{self.family} {self.variant}".strip()

    @property
    def title(self) -> str:
        """The name as a reader knows it."""
        return f"{TITLES.get(self.family, self.family)} {self.variant}".strip()

    @property
    def preset(self) -> str:
        return f"{self.family}-{self.size}"

    @property
    def untrained(self) -> bool:
        return self.tokens_trained == 0

    @classmethod
    def trained(cls, preset: str, seed: int, tokens: int, overrides: Mapping[str, Any]) -> Arm:
        """The arm of a run of `cratescope train`; overrides called attention and feed_forward name those blocks.

        overrides: what differs from the preset, configuration and penalty.
        """
        family, _, size = preset.rpartition("-")
        attention, feed_forward, site = _BUILT_IN[family]
        blocks = overrides.get("attention", attention), overrides.get("feed_forward", feed_forward)
        variant = " ".join(f"{name}={value}" for name, value in sorted(overrides.items()))
        return cls(family, *blocks, size, site, seed, tokens, variant)

    @classmethod
    def adopted(cls, source: str, family: str, layers: int | None, parameters: int, site: str) -> Arm:
        """The arm of a model trained elsewhere: each is an arm of its own, and nothing is known about its training."""
        millions = parameters / 1e6
        large = f"{millions / 1000:.3g}B" if millions >= 1000 else f"{millions:.3g}M"
        size = f"{layers}L-{large}" if layers else large
        return cls(family, "mhsa", "mlp", size, site, None, None, Path(source).name)

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Arm:
        """The arm that a run.json names; also reads older files, which hold only the parts it is made of."""
        if "arm" in manifest:
            return cls(**manifest["arm"])
        if "adopted" in manifest:
            source, family = manifest["adopted"], manifest["family"]
            return cls.adopted(source, family, manifest["n_layer"], manifest["parameters"], "mlp")
        overrides = manifest.get("settings", {}).get("crate") or {}
        return cls.trained(manifest["preset"], manifest["seed"], manifest["tokens_trained"], overrides)

    def row(self) -> dict[str, Any]:
        """The entry of run.json."""
        return dataclasses.asdict(self)
