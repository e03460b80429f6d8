"""Draw the answer of the sweeps: success over a random direction's at fixed KL, by model and kind of unit.

python studies/steer_figure.py docs/results/2l-20m-steer
"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KL = 0.5
UNITS = {
    ("neurons", ""): "neurons",
    ("sae/x16-relu", "delta"): "relu 16x, delta",
    ("sae/x16-relu", "replace"): "relu 16x, replace",
    ("sae/x16-batchtopk", "delta"): "batchtopk 16x, delta",
    ("sae/x16-batchtopk", "replace"): "batchtopk 16x, replace",
}
PANELS = {
    ("mass", ""): "success: rise of the targets' probability",
    ("mass", "aims"): "over a random direction (primary)",
    ("rate", "aims"): "the same, in written text",
}
ARMS = {"gpt2": ("GPT-2", "#d55e00", 0.16), "crate": ("CRATE", "#0072b2", -0.16)}

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Means over layers of trained models at the KL that decides."""
    rows = csv.DictReader(path.open(encoding="utf-8"))
    return [row for row in rows if row["layer"] == "mean" and float(row["kl"]) == KL and int(row["tokens_trained"])]


def chosen(rows: list[Row], panel: tuple[str, str], family: str, unit: tuple[str, str]) -> list[Row]:
    """One row a seed."""
    measure, tokens = panel
    over = "random" if tokens else ""
    wanted = {"measure": measure, "over": over, "tokens": tokens or "targets", "family": family, "mode": unit[1]}
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row for row in found if row["site"] == unit[0] or (unit[0] == "neurons" and not row["mode"])]


def draw(folder: Path) -> Path:
    """Write answer.png from steering.csv of a folder."""
    rows = read(folder / "steering.csv")
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10.4, 3.6), layout="constrained", sharey=True)
    for axes, (panel, title) in zip(panels, PANELS.items(), strict=True):
        for place, unit in enumerate(reversed(UNITS)):
            for family, (name, colour, up) in ARMS.items():
                found = chosen(rows, panel, family, unit)
                for turn, row in enumerate(found):
                    at = place + up + 0.09 * (turn - (len(found) - 1) / 2)
                    mean, low, high = (100 * float(row[key]) for key in ("mean", "low", "high"))
                    axes.plot([low, high], [at, at], color=colour, alpha=0.45, linewidth=1.2)
                    axes.plot(mean, at, "o", color=colour, alpha=0.6, markersize=4)
                if found:
                    middle = 100 * statistics.fmean(float(row["mean"]) for row in found)
                    label = name if unit[0] == "neurons" else None
                    axes.plot(middle, place + up, "|", color=colour, markersize=14, label=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.axvline(0, color="#888888", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.2)
        axes.set_xlabel(f"x 100, at KL = {KL:g} nats per token")
    panels[0].set_yticks(range(len(UNITS)), [*reversed(UNITS.values())])
    panels[0].legend(frameon=False)
    path = folder / "answer.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
