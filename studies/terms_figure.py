"""Draw the answer of studies/terms.toml: the difference of the two families, by explainer, measure and comparison.

python studies/terms_figure.py docs/results/2l-20m-terms
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROWS = [
    (f"{explainer}: {measure}", explainer, measure)
    for explainer in ("terms", "phrases")
    for measure in ("specific", "balanced", "unseen", "pearson")
]
LOOKS = {"equal tokens": ("o", "#1f5fa8", 0.14), "equal loss": ("s", "#c8641f", -0.14)}


def differences(pairs: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Tests of gains over the shuffled control on uniform text, by measure and comparison; no untrained models."""
    found = {}
    for pair in pairs:
        quantity = pair["quantity"]
        if (quantity["protocol"], quantity["over"]) == ("uniform", "shuffled") and pair["tokens_trained"] != 0:
            found[quantity["measure"], "equal tokens" if pair["loss"] is None else "equal loss"] = pair["test"]
    return found


def draw(folder: Path) -> Path:
    """Write answer.png from comparisons-terms.json and comparisons-phrases.json of a folder."""
    tests = {
        name: differences(json.loads((folder / f"comparisons-{name}.json").read_text()))
        for name in ("terms", "phrases")
    }
    figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for place, (_, explainer, measure) in enumerate(reversed(ROWS)):
        for kind, (marker, colour, up) in LOOKS.items():
            if test := tests[explainer].get((measure, kind)):
                low, value, high = (100 * test[name] for name in ("low", "difference", "high"))
                axes.plot([low, high], [place + up] * 2, color=colour, linewidth=2)
                axes.plot(value, place + up, marker, color=colour, label=kind if place == len(ROWS) - 1 else None)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.axhline(len(ROWS) / 2 - 0.5, color="#dddddd", linewidth=1)
    axes.set_yticks(range(len(ROWS)), [label for label, *_ in reversed(ROWS)])
    axes.set_xlabel("CRATE less GPT-2, gain over shuffled x 100, uniform text (95 % intervals, 3 pairs of seeds)")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / "answer.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
