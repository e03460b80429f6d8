"""Answer the questions of docs/evaluation.md, "The frontier", from runs that were scored by terms.

python studies/frontier_answer.py docs/results/frontier frontier/runs/*

Writes models.csv, a row per model, and answers.csv, a row per comparison of two arms over seeds.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from cratescope.results.compare import Quantity
from cratescope.results.runs import Results, Row, load_results
from cratescope.results.tables import write_csv
from cratescope.score.inference import compare_seeds
from cratescope.score.quality import matched

PRIMARY = Quantity("uniform", "specific", "shuffled")
LOW, HIGH = 0.01, 0.4
"""Densities between which the primary measure is calibrated (docs/evaluation.md)."""
FEATURES = " + sae/as-sparse"
ARMS = {
    "crate-h": ("gpt2", "crate", "gpt2" + FEATURES, "gpt2-h", "gpt2 l1=0.001"),
    "crate-h-lag": ("gpt2-lag", "crate", "gpt2-lag" + FEATURES, "gpt2-h-lag", "gpt2-lag l1=0.001"),
}
"""What is asked about, and what it is compared with, after its untrained copy."""


def loss(item: Results) -> float | None:
    """Nats per token; of features there is none of this kind."""
    return None if item.features else item.evaluation["loss"]


def primary(item: Results, kept: Callable[[float], bool] = lambda density: True) -> float | None:
    """Mean over layers of the primary measure, x 100, of neurons whose density is `kept`."""
    found = []
    for layer, scores in PRIMARY.by_index(item).items():
        values = [
            scores[index] for index, density in densities(item, layer).items() if index in scores and kept(density)
        ]
        found.append(statistics.fmean(values) if values else None)
    return None if None in found or not found else 100 * statistics.fmean(found)


def densities(item: Results, layer: int) -> dict[int, float]:
    activity = item.activity[layer]
    return dict(zip(activity.index.tolist(), activity.density.tolist(), strict=True))


def calibrated(density: float) -> bool:
    return LOW <= density <= HIGH


def model_row(item: Results) -> Row:
    row: Row = {"model": item.label, "arm": item.side, "seed": item.arm.seed, "tokens": item.arm.tokens_trained}
    row |= {"loss": loss(item), "primary": primary(item), "primary_calibrated": primary(item, calibrated)}
    for layer, explained in zip(item.activity, item.evaluation.get("reconstruction") or (None, None), strict=False):
        found = [*densities(item, layer).values()]
        row |= {f"active_{layer}": statistics.fmean(found), f"dead_{layer}": found.count(0) / len(found)}
        row |= {f"rare_{layer}": sum(value < LOW for value in found) / len(found), f"r2_{layer}": explained}
        row |= {f"frequent_{layer}": sum(value > HIGH for value in found) / len(found)}
    return row


def at_matched_density(a: Results, b: Results) -> tuple[float, float] | None:
    """The primary measure of two runs, x 100, as if the neurons of both fired equally often."""
    sides = []
    for layer in a.activity:
        columns = []
        for item in (a, b):
            scores, found = PRIMARY.by_index(item)[layer], densities(item, layer)
            columns.append({"density": [*found.values()], "primary": [scores.get(index) for index in found]})
        sides.append(matched(*columns, "primary"))
    if None in sides:
        return None
    return tuple(100 * statistics.fmean(side[name] for side in sides if side) for name in "ab")  # type: ignore[return-value]


def answers(results: Sequence[Results]) -> list[Row]:
    """Differences of what is asked about and what it is compared with, by seed, with the t-interval over seeds."""
    trained: dict[str, dict[int | None, Results]] = {}
    copies: dict[str, dict[int | None, Results]] = {}
    for item in results:
        (copies if item.arm.untrained else trained).setdefault(item.side, {})[item.arm.seed] = item
    rows = []
    for arm, others in ARMS.items():
        sides = [("its untrained copy", copies.get(arm, {})), *((name, trained.get(name, {})) for name in others)]
        for name, other in sides:
            seeds = sorted({*trained.get(arm, {})} & {*other}, key=str)
            pairs = {seed: (trained[arm][seed], other[seed]) for seed in seeds}
            for quantity, measure in QUANTITIES.items():
                values = {seed: found for seed, pair in pairs.items() if (found := measure(*pair))}
                if values:
                    rows.append({"a": arm, "b": name, "quantity": quantity} | _difference(values))
    return rows


def _difference(values: dict[int | None, tuple[float, float]]) -> Row:
    a, b = ({seed or 0: pair[side] for seed, pair in values.items()} for side in (0, 1))
    test = compare_seeds(a, b)
    row: Row = {"seeds": len(a), "a_mean": statistics.fmean(a.values()), "b_mean": statistics.fmean(b.values())}
    row |= {"difference": row["a_mean"] - row["b_mean"]}
    row |= {name: getattr(test, name, None) for name in ("low", "high", "p")}
    return row | {f"difference_{seed}": a[seed] - b[seed] for seed in sorted(a)}


def _both(measure: Callable[[Results], float | None]) -> Callable[[Results, Results], tuple[float, float] | None]:
    def both(a: Results, b: Results) -> tuple[float, float] | None:
        one, other = measure(a), measure(b)
        return None if one is None or other is None else (one, other)

    return both


QUANTITIES = {
    "loss": _both(loss),
    "primary": _both(primary),
    "primary, 1 to 40 % active": _both(lambda item: primary(item, calibrated)),
    "primary at matched density": at_matched_density,
}


def main(out: Path, runs: Sequence[Path]) -> None:
    results = load_results(tuple(runs), "terms", "terms")
    for name, rows in (("models", [model_row(item) for item in results]), ("answers", answers(results))):
        columns = dict.fromkeys(chain.from_iterable(rows))
        write_csv(out / f"{name}.csv", lambda rows=rows, columns=columns: ({**columns, **row} for row in rows))  # type: ignore[misc]
        for row in rows:
            print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
