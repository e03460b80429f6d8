"""Draw the answer of studies/sae.toml: gains over shuffled of neurons and of features, by model and seed.

python studies/sae_figure.py docs/results/2l-20m-sae
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

UNITS = {
    "neurons": "neurons",
    "sae/x16-relu": "relu 16x (the paper's)",
    "sae/x16-batchtopk": "batchtopk 16x",
    "sae/x16-frozen": "random decoder",
    "sae/x16-rotation": "neurons, axes turned",
    "untrained": "batchtopk 16x of the\nuntrained copy",
}
PANELS = {
    ("top-and-random", "pearson"): "top and random windows, r",
    ("uniform", "specific"): "uniform text, specific",
}
ARMS = {"gpt2": ("GPT-2", "#d55e00", 0.14), "crate": ("CRATE", "#0072b2", -0.14)}

Gains = dict[tuple[str, str, str, str], list[float]]


def gains(path: Path) -> Gains:
    """Mean over layers of each run by protocol, measure, family and unit, x 100."""
    found: Gains = defaultdict(list)
    for row in csv.DictReader(path.open(encoding="utf-8")):
        if row["layer"] != "mean" or not row["over_shuffled"]:
            continue
        unit = row["site"] if row["site"].startswith("sae/") else "neurons"
        if row["tokens_trained"] == "0":
            if unit != "sae/x16-batchtopk":
                continue
            unit = "untrained"
        found[row["protocol"], row["measure"], row["family"], unit].append(100 * float(row["over_shuffled"]))
    return found


def draw(folder: Path) -> Path:
    """Write answer.png from scores-terms.csv of a folder."""
    found = gains(folder / "scores-terms.csv")
    figure, panels = plt.subplots(1, len(PANELS), figsize=(8.4, 3.6), layout="constrained", sharey=True)
    for axes, ((protocol, measure), title) in zip(panels, PANELS.items(), strict=True):
        for place, unit in enumerate(reversed(UNITS)):
            for family, (name, colour, up) in ARMS.items():
                if values := found.get((protocol, measure, family, unit)):
                    axes.plot(values, [place + up] * len(values), "o", color=colour, alpha=0.45, markersize=5)
                    label = name if unit == "neurons" else None
                    axes.plot(statistics.fmean(values), place + up, "|", color=colour, markersize=13, label=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.axvline(0, color="#888888", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.2)
        axes.set_xlabel("gain over shuffled x 100")
    panels[0].set_yticks(range(len(UNITS)), [*reversed(UNITS.values())])
    panels[0].legend(frameon=False)
    path = folder / "answer.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
