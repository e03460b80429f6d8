"""Answer the questions of docs/evaluation.md, "The frontier", from runs that were scored.

python studies/frontier_answer.py docs/results/frontier frontier/runs/*

Writes models.csv, a row per model and explainer, and answers.csv, a row per comparison of two arms over seeds.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

from cratescope.errors import UserError
from cratescope.results.compare import Quantity
from cratescope.results.runs import Results, Row, load_results
from cratescope.results.tables import write_csv
from cratescope.score.inference import compare_seeds
from cratescope.score.quality import matched

PRIMARY = Quantity("uniform", "specific", "shuffled")
PAPERS = [Quantity("top-and-random", "pearson", "shuffled"), Quantity("anthropic", "spearman", "shuffled")]
BY = {"terms": ("terms", [PRIMARY]), "offline": ("list-pmi", [PRIMARY, *PAPERS])}
"""Explainer: its simulator, and the gains over another neuron's explanation that it is asked for."""
LOW, HIGH = 0.01, 0.4
"""Densities between which the primary measure is calibrated."""
FEWEST = 50
"""Units that have to be matched for a mean of them."""
FEATURES = " + sae/as-sparse"
_WITH_LAG = ("gpt2-lag", "crate", "gpt2-lag" + FEATURES, "gpt2-h-lag", "gpt2-lag l1=0.001")
ARMS = {
    "crate-h": ("gpt2", "crate", "gpt2" + FEATURES, "gpt2-h", "gpt2 l1=0.001"),
    "crate-h-lag": _WITH_LAG,
    "crate-h-lag bilinear=true": _WITH_LAG,
    "crate-h-lag bilinear=true reconstruction_weight=3": _WITH_LAG,
}
"""What is asked about, and what it is compared with, after its untrained copy, in which the form is none."""

Both = tuple[float, float]


def densities(item: Results, layer: int) -> dict[int, float]:
    """Share of the tokens on which each unit is active, by index."""
    activity = item.activity[layer]
    return dict(zip(activity.index.tolist(), activity.density.tolist(), strict=True))


def calibrated(density: float) -> bool:
    return LOW <= density <= HIGH


def gain(item: Results, quantity: Quantity, kept: Callable[[float], bool] = lambda density: True) -> float | None:
    """Mean over layers, x 100, of the units whose density is `kept`."""
    means = []
    for layer, scores in quantity.by_index(item).items():
        density = densities(item, layer)
        values = [score for index, score in scores.items() if kept(density[index])]
        means.append(statistics.fmean(values) if values else None)
    known = [mean for mean in means if mean is not None]
    return 100 * statistics.fmean(known) if known and len(known) == len(means) else None


def primary_by_density(item: Results, layer: int) -> dict[str, list[Any]]:
    scores, density = PRIMARY.by_index(item).get(layer, {}), densities(item, layer)
    return {"density": [*density.values()], "primary": [scores.get(index) for index in density]}


def at_matched_density(a: Results, b: Results) -> Both | None:
    """The primary measure of two runs, x 100, as if the units of both were active equally often; None for too few.

    A layer counts by how many of its units are matched.
    """
    found = []
    for layer in a.activity:
        if one := matched(primary_by_density(a, layer), primary_by_density(b, layer), "primary"):
            found.append(one)
    n = sum(one["n"] for one in found)
    if n < FEWEST:
        return None
    means = [100 * sum(one["n"] * one[side] for one in found) / n for side in "ab"]
    return means[0], means[1]


def loss(item: Results) -> float | None:
    """Nats per token; features have none of this kind."""
    return None if item.features else item.evaluation["loss"]


def of_both(measure: Callable[[Results], float | None]) -> Callable[[Results, Results], Both | None]:
    """A measure of one run as one of two."""

    def both(a: Results, b: Results) -> Both | None:
        one, other = measure(a), measure(b)
        return None if one is None or other is None else (one, other)

    return both


def measures(explainer: str) -> dict[str, Callable[[Results, Results], Both | None]]:
    found = {q.name: of_both(lambda item, q=q: gain(item, q)) for q in BY[explainer][1]}  # type: ignore[misc]
    if explainer == "terms":  # of every unit, so that it can be asked for some
        found |= {"loss": of_both(loss), "primary, matched density": at_matched_density}
        found["primary, 1 to 40 % active"] = of_both(lambda item: gain(item, PRIMARY, calibrated))
    return found


def model_row(item: Results, explainer: str) -> Row:
    row: Row = {"model": item.label, "arm": item.side, "seed": item.arm.seed, "tokens": item.arm.tokens_trained}
    row |= {"explainer": explainer, "loss": loss(item)}
    row |= {quantity.name: gain(item, quantity) for quantity in BY[explainer][1]}
    for layer, explained in zip(item.activity, item.evaluation.get("reconstruction") or (None, None), strict=False):
        found = [*densities(item, layer).values()]
        row |= {f"active_{layer}": statistics.fmean(found), f"dead_{layer}": found.count(0) / len(found)}
        row |= {f"below_1_percent_{layer}": sum(value < LOW for value in found) / len(found)}
        row |= {f"above_40_percent_{layer}": sum(value > HIGH for value in found) / len(found)}
        row |= {f"r2_{layer}": None if item.features else explained}
    for quality in item.dictionary.quality if item.dictionary else ():
        row[f"loss_replaced_{quality['layer']}"] = quality["loss_replaced"]
    return row


def answers(results: Sequence[Results], explainer: str) -> Iterator[Row]:
    """Differences of what is asked about and what it is compared with, by seed, with the t-interval over seeds.

    Only models of one size after equally many tokens are compared, except with untrained copies.
    """
    seeds: dict[tuple[str, str, int], dict[int, Results]] = {}
    for item in results:
        seeds.setdefault((item.side, item.arm.size, item.arm.tokens_trained or 0), {})[item.arm.seed or 0] = item
    lengths = sorted({(size, tokens) for _, size, tokens in seeds if tokens})
    for (arm, others), (size, tokens) in product(ARMS.items(), lengths):
        asked = seeds.get((arm, size, tokens), {})
        sides = [("its untrained copy", seeds.get((arm.split()[0], size, 0), {}))]
        for name, other in [*sides, *((name, seeds.get((name, size, tokens), {})) for name in others)]:
            pairs = {seed: (asked[seed], other[seed]) for seed in sorted({*asked} & {*other})}
            about: Row = {"a": arm, "b": name, "size": size, "tokens": tokens, "explainer": explainer}
            for quantity, measure in measures(explainer).items():
                values = {seed: found for seed, pair in pairs.items() if (found := measure(*pair))}
                if values:
                    yield about | {"quantity": quantity} | difference(values)


def difference(values: dict[int, Both]) -> Row:
    a, b = ({seed: pair[side] for seed, pair in values.items()} for side in (0, 1))
    test = compare_seeds(a, b)
    row: Row = {"seeds": len(a), "a_mean": statistics.fmean(a.values()), "b_mean": statistics.fmean(b.values())}
    row |= {"difference": row["a_mean"] - row["b_mean"]}
    row |= {name: getattr(test, name, None) for name in ("low", "high", "p")}
    return row | {f"difference_{seed}": a[seed] - b[seed] for seed in sorted(a)}


def scored(runs: Sequence[Path], explainer: str) -> Iterator[Results]:
    """The runs that were scored by an explainer; others are left out."""
    for run in runs:
        try:
            yield from load_results([run], explainer, BY[explainer][0])
        except UserError as error:
            if "run `cratescope score" not in str(error):
                raise
            print(f"{run.name}: not scored by {explainer}", file=sys.stderr)


def main(out: Path, runs: Sequence[Path]) -> None:
    found = {explainer: [*scored(runs, explainer)] for explainer in BY}
    models = [model_row(item, explainer) for explainer, results in found.items() for item in results]
    asked = [row for explainer, results in found.items() for row in answers(results, explainer)]
    for name, rows in (("models", models), ("answers", asked)):
        columns = dict.fromkeys(chain.from_iterable(rows))
        whole = [columns | row for row in rows]
        write_csv(out / f"{name}.csv", whole.__iter__)
        for row in rows:
            print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
    except UserError as error:
        sys.exit(f"frontier_answer: {error}")
