"""Many neurons: what explaining, simulating, scoring and reporting cost besides the language model.

Records of made-up neurons are written as columns: each neuron fires on five words of a vocabulary of 2,000, in short
windows. A scripted language model answers in no time: it explains a neuron by the first words it is shown, and lists
the words of an explanation, so that what is measured is ours. Every stage is a process of its own that says its wall
time, its processor time (user and system, the steadier one on a machine that others use too), its peak memory and how
many files there are in the run afterwards.

    python benchmarks/neurons.py                              # 100,000 neurons in four layers
    python benchmarks/neurons.py --neurons 10000 --kept runs  # fewer; keep the run in this folder
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

STAGES = ("records", "explain", "simulate", "score", "report", "show")
SITE, NAME = "codes", "crate"
WORDS, FIRES_ON = 2000, 5
TOP, RANDOM = 10, 10
"""Windows of a neuron."""
TEXTS = 2000
"""Words that the scripted model knows beside the vocabulary, so that its logits are a table of 4,000."""


@dataclass(frozen=True)
class Options:
    """Measure every stage on made-up neurons."""

    neurons: int = 100_000
    """Neurons in all layers together."""
    layers: int = 4
    width: int = 8
    """Tokens of a window."""
    protocols: tuple[str, ...] = ("top-and-random", "random-only")
    """Protocols scored."""
    kept: Path | None = None
    """Keep the run and its report here; what is there is not made again. A temporary folder by default."""
    json: Path | None = None
    """Also write the measurements here."""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.kept or Path(temporary)
        told = {"neurons": options.neurons, "layers": options.layers, "width": options.width}
        told |= {"protocols": options.protocols, "folder": str(folder)}
        rows = [measure(told | {"stage": stage}) for stage in STAGES]
    show(rows, options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(told: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", json.dumps(told)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: Sequence[dict[str, Any]], options: Options) -> None:
    table = Table(title=f"{options.neurons:,} neurons, {options.layers} layers, windows of {options.width} tokens")
    for name in ("stage", "wall (s)", "processor (s)", "peak memory (GB)", "before (GB)", "files in the run"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        numbers = [f"{row[name]:.1f}" for name in ("wall", "cpu")] + [f"{row[name]:.2f}" for name in ("peak", "before")]
        table.add_row(row["stage"], *numbers, f"{row['files']:,}")
    Console(width=120).print(table)


def work(told: dict[str, Any]) -> None:
    """Do one stage and say what it took; imports are not counted, and their memory is said by itself."""
    folder = Path(told["folder"])
    do = stage(told, folder)
    before, wall, cpu = peak(), time.perf_counter(), time.process_time()
    do()
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "before": before, "peak": peak()}
    files = sum(path.is_file() for path in folder.rglob("*"))
    sys.stdout.write(json.dumps({"stage": told["stage"]} | took | {"files": files}) + "\n")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def stage(told: dict[str, Any], folder: Path) -> Callable[[], object]:
    """What is to be measured, with all that it imports there."""
    from cratescope.explain.config import ExplainConfig, SimulateConfig
    from cratescope.explain.explain import explain
    from cratescope.explain.simulate import simulate
    from cratescope.report.card import card_text
    from cratescope.report.config import ReportConfig
    from cratescope.report.report import report
    from cratescope.run import Run
    from cratescope.score.config import ScoreConfig
    from cratescope.score.score import score

    run, protocols, llm = folder / NAME, tuple(told["protocols"]), Scripted()
    primary = f"{protocols[0]}/pearson/shuffled"
    return {
        "records": lambda: make_run(run, told["neurons"], told["layers"], told["width"]),
        "explain": lambda: explain(ExplainConfig(run, protocols=protocols), llm),
        "simulate": lambda: simulate(SimulateConfig(run, protocols=protocols), llm),
        "score": lambda: score(ScoreConfig(run, protocols=protocols)),
        "report": lambda: report(ReportConfig((run,), folder / "report", primary=primary)),
        "show": lambda: card_text(Run(run).neuron(0, 7)),
    }[told["stage"]]


class Scripted:
    """A language model that finishes a list of words with the first of them, and lists the words it was told."""

    name, dtype = "scripted", "float32"

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self._ids.setdefault(piece, len(self._ids)) for piece in re.findall(r" ?\w+|\s|[^\w\s]", text)]

    def generate(
        self, _prefix: Sequence[int], prompts: Sequence[Sequence[int]], _most: int, _stop: str
    ) -> Sequence[str]:
        pieces = list(self._ids)
        return [" words like" + "".join(pieces[place] for place in ids[3:8]) for ids in prompts]

    def next_logprobs(self, _prefix: Sequence[int], prompts: Sequence[Sequence[int]]) -> np.ndarray:
        logits = np.zeros((len(prompts), WORDS + TEXTS))
        for row, ids in zip(logits, prompts, strict=True):
            row[list(ids)] = 6.0
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


# --- made-up neurons ---


def make_run(folder: Path, neurons: int, layers: int, width: int) -> None:
    """A run with a tokenizer, an evaluation and a record of every neuron, without a model."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from cratescope.arm import Arm
    from cratescope.files import write_json, write_text
    from cratescope.run import Run, claim

    run = Run(folder)
    texts = ["<|endoftext|>", *(f"Ġ{name}" for name in words())]
    tokenizer = Tokenizer(models.WordLevel({text: place for place, text in enumerate(texts)}, "<|endoftext|>"))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(run.model)
    manifest = {"arm": Arm.trained(f"crate-{layers}l", 0, 1000, {}).row(), "parameters": 1, "n_layer": layers}
    manifest |= {"context": 256, "steps": 1, "data": {"path": "nowhere", "manifest_sha256": "0" * 64}}
    write_json(run.manifest, manifest)
    numbers = dict.fromkeys(("loss", "standard_error", "perplexity", "bits_per_byte", "unigram_entropy"), 1.0)
    write_json(run.evaluation, numbers | {"split": "validation", "n_tokens": 1000})
    write_text(run.metrics, '{"step": 1, "tokens": 1000, "validation_loss": 1.0}\n')
    claim(run.records(SITE), {"imported": "openai", "sha256": "0" * 64})
    for layer in range(layers):
        n = neurons // layers + (layer < neurons % layers)
        write_layer(run, layer, n, width, np.random.default_rng(layer))


def words() -> list[str]:
    """Words of two or three letters."""
    letters = "abcdefghijklmnoprstuvwxyz"
    return [a + b + c for a in letters for b in "aeiou" for c in letters][:WORDS]


def write_layer(run: Any, layer: int, n: int, width: int, random: np.random.Generator) -> None:
    """Records of n neurons, column by column: windows hold one of the neuron's words, random ones seldom."""
    import pyarrow as pa

    from cratescope.neurons import records

    each = TOP + RANDOM
    wanted = random.integers(1, WORDS + 1, (n, FIRES_ON))
    tokens = random.integers(1, WORDS + 1, (n, each, width))
    tokens[:, :TOP, width // 2] = np.take_along_axis(wanted, random.integers(FIRES_ON, size=(n, TOP)), 1)
    rare = random.random((n, RANDOM)) < 0.3
    tokens[:, TOP:, 0][rare] = np.take_along_axis(wanted, random.integers(FIRES_ON, size=(n, RANDOM)), 1)[rare]
    fires = (tokens[..., None] == wanted[:, None, None]).any(-1)
    activations = fires * random.uniform(1, 4, tokens.shape)
    activations[:, :TOP] = -np.sort(-activations[:, :TOP].max(2))[..., None] * fires[:, :TOP]

    def lists(chosen: slice, count: int) -> pa.Array:
        part, values = tokens[:, chosen].ravel(), activations[:, chosen].ravel()
        place = np.tile(np.arange(count) + chosen.start, n)
        columns = np.full(n * count, width), place, np.full(n * count, 7), np.full(n * count, width // 2)
        return records.list_column(np.full(n, count), records.window_array(part, values, *columns))

    none = [[] for _ in range(n)]
    bins = [[{"low": 0.0, "high": 0.5, "count": 990}, {"low": 0.5, "high": 4.0, "count": 10}]] * n
    columns: dict[str, Any] = {name: none for name in records.SCHEMA.names}
    columns |= {"model": [NAME] * n, "site": [SITE] * n, "layer": np.full(n, layer), "index": np.arange(n)}
    columns |= {"n_tokens": np.full(n, 1000), "maximum": activations.max((1, 2)), "dead": np.zeros(n, bool)}
    columns |= {name: np.ones(n) for name in ("mean", "variance", "third", "fourth", "skewness", "kurtosis")}
    columns |= {"density": random.uniform(0.001, 0.02, n), "histogram": bins}
    columns |= {"top": lists(slice(0, TOP), TOP), "random": lists(slice(TOP, each), RANDOM)}
    records.write_table(records.layer_file(run.records(SITE), layer), columns)


if __name__ == "__main__":
    main()
