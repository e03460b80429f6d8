"""What explanations by terms cost and say on the records of runs: processor seconds and gains, with and without joints.

The run is copied without its results, and every neuron of every layer is explained, simulated and scored on uniform
windows, one thread, each stage in this process after its imports.

    python benchmarks/terms.py demo/runs/crate-2l demo/runs/crate-2l-untrained
    python benchmarks/terms.py demo/runs/crate-2l --ways named joints words --neurons 100
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tyro
from rich.console import Console
from rich.table import Table

from cratescope.explain.config import ExplainConfig, SimulateConfig, TermsConfig
from cratescope.explain.explain import explain
from cratescope.explain.simulate import simulate
from cratescope.hardware import keep_freed_memory
from cratescope.results.scores import Scores
from cratescope.run import Run
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score

WAYS = {
    "named": TermsConfig(),
    "joints": TermsConfig(joints=True),
    "words": TermsConfig(5, named_only=False),
}
PROTOCOLS = ("uniform",)


@dataclass(frozen=True)
class Options:
    """Measure every way on every run."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories with records (and strata)."""
    ways: tuple[str, ...] = ("named", "joints")
    """Which of named (3 named terms), joints, words (5 terms, also single words and pieces)."""
    neurons: int | None = None
    """Neurons per layer; all by default."""
    measures: tuple[str, ...] = ("pearson", "balanced", "specific", "unseen")
    """Measures shown, where they are scored."""
    json: Path | None = None
    """Also write the measurements here."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    keep_freed_memory()  # as the command line does
    rows = [measured(run, way, options) for run in options.runs for way in options.ways]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(
        *columns, title="explanations by terms: processor seconds, and gain over shuffled x 100 on uniform text"
    )
    for row in rows:
        table.add_row(*(f"{row[name]:.1f}" if isinstance(row[name], float) else str(row[name]) for name in columns))
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measured(source: Path, way: str, options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        made = shutil.ignore_patterns(
            "explanations", "simulations", "judgements", "scores", "checkpoints", "milestones"
        )
        run = Run(shutil.copytree(source, Path(folder) / source.name, ignore=made))
        by_terms = {"explainer": "terms", "protocols": PROTOCOLS}
        config = ExplainConfig(run.root, terms=WAYS[way], neurons=options.neurons, **by_terms)
        stages: dict[str, Callable[[], object]] = {
            "explain": lambda: explain(config),
            "simulate": lambda: simulate(SimulateConfig(run.root, simulator="terms", **by_terms)),
            "score": lambda: score(ScoreConfig(run.root, simulator="terms", **by_terms)),
        }
        row: dict[str, Any] = {"run": source.name, "way": way}
        for name, work in stages.items():
            start = time.process_time()
            work()
            row[name] = time.process_time() - start
        (folder_of_scores,) = (run.root / "scores").glob("*/terms/terms")
        scores = Scores.read(folder_of_scores)
        means = {name: scores.mean("uniform", name, over="shuffled") for name in scores.measures("uniform")}
        row["neurons"] = scores.mean("uniform").n
        return row | {name: 100 * (means[name].mean or 0.0) for name in options.measures if name in means}


if __name__ == "__main__":
    sys.exit(main())
