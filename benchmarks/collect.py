"""Collecting neuron records, side by side: the research code's method, the bare forward pass, and ours.

*plain* does what the research code does: run the model, keep every activation of the layer, then for each neuron sort
all of them and compute its moments. *head* is the same where the model also computes its logits, as a transformers
model does unless told otherwise. *bare* runs the model up to the last wanted layer and looks at nothing. *ours* is
`cratescope collect` from the pilot to the Parquet files, with and without strata. Every measurement is a process of
its own; the ways take turns, round after round, and medians are compared. Net peak memory is the process's largest
resident size less what it held when imports, model and text were there.

    python benchmarks/collect.py                               # 200 and 1,600 excerpts of CRATE-2L, one layer
    python benchmarks/collect.py --excerpts 200 3200 --ways bare ours       # is memory flat?
    python benchmarks/collect.py --preset crate-3l --layers 0 1 2 --ways bare lean ours
    python benchmarks/collect.py --grow                        # cost as layers, neurons and windows grow
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

WAYS = {
    "plain": "plain: keep all, sort each neuron",
    "head": "plain, logits computed too",
    "bare": "bare forward pass up to the layer",
    "lean": "ours without strata",
    "ours": "ours",
}
CONTEXT = 1024


@dataclass(frozen=True)
class Options:
    """Measure every way on every number of excerpts."""

    excerpts: tuple[int, ...] = (200, 1600)
    """Excerpts of 1024 tokens."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Which ways."""
    preset: str = "crate-2l"
    """An untrained model of this preset; `gpt2-1l:3072` is a GPT-2 of one layer with 3072 neurons."""
    run: Path | None = None
    """A trained run instead; its text is not needed, random tokens are read."""
    layers: tuple[int, ...] = (0,)
    """Layers read in one pass (plain: the first of them)."""
    top: int = 50
    """Windows of the highest activations."""
    threads: int = 1
    """Threads of every process."""
    rounds: int = 3
    """Measurements of each way."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu is the steadier one on a machine that others use too, with one thread."""
    grow: bool = False
    """Measure instead how the cost grows with layers, neurons and windows."""
    json: Path | None = None
    """Also write the measurements here."""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    options = tyro.cli(Options, description=__doc__)
    console, rows = Console(width=140, soft_wrap=True), []
    for told in cases(options):
        rows += compare(told, options, console)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not options.grow:
        extrapolate(rows, console)


def cases(options: Options) -> list[dict[str, Any]]:
    """What to measure, a table each."""
    base: dict[str, Any] = {"preset": options.preset, "layers": options.layers, "top": options.top}
    base |= {"run": options.run and str(options.run), "threads": options.threads}
    if not options.grow:
        return [base | {"excerpts": n} for n in options.excerpts]
    base |= {"excerpts": options.excerpts[0]}
    return [
        *(base | {"preset": "crate-3l", "layers": tuple(range(n))} for n in (1, 2, 3)),
        *(base | {"preset": f"gpt2-1l:{n}", "layers": (0,)} for n in (512, 3072, 8192)),
        *(base | {"preset": "crate-1l", "layers": (0,), "top": k} for k in (10, 50, 200, 1000)),
    ]


# --- the driver ---


def compare(told: dict[str, Any], options: Options, console: Console) -> list[dict[str, Any]]:
    ways = [way for way in options.ways if not (options.grow and way in ("plain", "head"))]
    answers: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            answers[way].append(measure(told | {"way": way}))
    tokens = told["excerpts"] * CONTEXT
    rows = []
    for way in ways:
        seconds = statistics.median(answer[options.clock] for answer in answers[way])
        peak = statistics.median(answer["net_peak_bytes"] for answer in answers[way])
        rows.append(told | {"way": way, "seconds": seconds, "tokens_per_second": tokens / seconds})
        rows[-1] |= {"net_peak_bytes": peak, "clock": options.clock, "neurons": answers[way][0]["neurons"]}
    by_way = {row["way"]: row for row in rows}
    layers = ",".join(map(str, told["layers"]))
    title = f"{told['run'] or told['preset']}, layers {layers}, {told['excerpts']} x {CONTEXT}, top {told['top']}"
    table = Table(title=f"{title}, {told['threads']} thread(s), {options.clock} time, median of {options.rounds}")
    for name in ("way", "seconds", "tokens/s", "x plain", "x bare seconds", "net peak GB"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        faster = f"{by_way['plain']['seconds'] / row['seconds']:.1f}" if "plain" in by_way else ""
        slower = f"{row['seconds'] / by_way['bare']['seconds']:.2f}" if "bare" in by_way else ""
        figures = [f"{row['seconds']:.1f}", f"{row['tokens_per_second']:,.0f}", faster, slower]
        table.add_row(WAYS[row["way"]], *figures, f"{row['net_peak_bytes'] / 1e9:.2f}")
    console.print(table)
    return rows


def measure(told: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", json.dumps(told)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def extrapolate(rows: list[dict[str, Any]], console: Console) -> None:
    """The plain method at the paper's 8,000 excerpts: a n + b n log n through its last two measurements."""
    plain = [row for row in rows if row["way"] == "plain"]
    if len(plain) < 2:
        return
    sizes = [row["excerpts"] * CONTEXT for row in plain[-2:]]
    system = [[n, n * math.log2(n)] for n in sizes]
    linear, sorting = np.linalg.solve(system, [row["seconds"] for row in plain[-2:]])
    n = 8000 * CONTEXT
    seconds = linear * n + sorting * n * math.log2(n)
    gigabytes = plain[-1]["net_peak_bytes"] / sizes[-1] * n / 1e9
    console.print(f"plain at 8,000 x {CONTEXT}, extrapolated: {seconds:,.0f} s, {gigabytes:.0f} GB a layer")


# --- one measurement ---


def work(told: dict[str, Any]) -> None:
    """Do it once and say what it took."""
    import pyarrow as pa
    import torch
    from transformers.utils import logging

    import cratescope.neurons.collect  # noqa: F401 (imports are not part of the measurement)
    from cratescope.hardware import keep_freed_memory

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pa.array(np.zeros(1))  # imports pandas where it is installed
    torch.set_num_threads(told["threads"])
    keep_freed_memory()
    model = load(told)
    text = zipf_text(told["excerpts"], model.config.vocab_size)
    do: Callable[..., int] = {"plain": plain, "head": plain, "bare": bare}.get(told["way"], ours)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        warm_up(model, told)
        before = resident()
        wall, cpu = time.perf_counter(), time.process_time()
        neurons = do(told, model, text, Path(folder))
        answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "neurons": neurons}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps(answer | {"net_peak_bytes": max(0, peak - before)}) + "\n")


def load(told: dict[str, Any]) -> Any:
    from cratescope.models.folder import load_folder
    from cratescope.models.presets import build, preset_config

    if told["run"]:
        return load_folder(Path(told["run"]) / "model").eval()
    preset, _, neurons = told["preset"].partition(":")
    config = preset_config(preset)
    if neurons:
        config.n_inner = int(neurons)
    return build(config, 0).eval()


def zipf_text(n: int, vocab_size: int) -> np.ndarray:
    """Random tokens with the frequencies of language, in the smallest integers that hold them."""
    chances = 1 / np.arange(1, vocab_size + 1)
    text = np.empty((n, CONTEXT), dtype=np.min_scalar_type(vocab_size))
    for number in range(n):
        text[number] = np.random.default_rng(number).choice(vocab_size, CONTEXT, p=chances / chances.sum())
    return text


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def warm_up(model: Any, told: dict[str, Any]) -> None:
    bare(told, model, zipf_text(1, model.config.vocab_size), Path())


def bare(told: dict[str, Any], model: Any, text: np.ndarray, folder: Path) -> int:
    import torch

    from cratescope.neurons.sites import partial_pass, site_named

    site, widths = site_named("auto", model), []
    with partial_pass(model, site, told["layers"], lambda layer, x: widths.append(x.shape[-1])) as run:
        for start in range(0, len(text), 8):
            run(torch.from_numpy(text[start : start + 8].astype(np.int64)))
    return sum(widths[: len(told["layers"])])


def ours(told: dict[str, Any], model: Any, text: np.ndarray, folder: Path) -> int:
    from cratescope.neurons.collect import Pass
    from cratescope.neurons.config import CollectConfig
    from cratescope.neurons.sites import site_named

    config = CollectConfig(folder, excerpts=len(text), top=told["top"], strata=told["way"] == "ours")
    site = site_named("auto", model)
    work = Pass(config, model, site, list(told["layers"]), text, folder / "records" / site.name)
    work.read(range(work.n_parts))
    work.finish({"model": "benchmark", "site": site.name})
    return sum(plan.n_neurons for plan in work.plans.values())


def plain(told: dict[str, Any], model: Any, text: np.ndarray, folder: Path) -> int:
    """Everything in memory, one layer, the model run to its end, a full sort a neuron."""
    import torch

    from cratescope.neurons.sites import read_site, site_named

    layer, activations = told["layers"][0], np.empty(0, dtype=np.float32)
    forward = model if told["way"] == "head" else model.base_model
    with read_site(model, site_named("auto", model), [layer]) as found:
        for start in range(0, len(text), 8):
            forward(torch.from_numpy(text[start : start + 8].astype(np.int64)), use_cache=False)
            if not start:
                activations = np.empty((text.size, found[layer].shape[-1]), dtype=np.float32)
            batch = found[layer].flatten(0, 1).numpy()
            activations[start * CONTEXT : start * CONTEXT + len(batch)] = batch
    random = np.random.default_rng(0)
    for neuron in range(activations.shape[1]):
        plain_neuron(np.ascontiguousarray(activations[:, neuron]), told["top"], random)
    return activations.shape[1]


def plain_neuron(a: np.ndarray, top: int, random: np.random.Generator) -> tuple[Any, ...]:
    """Windows by rank out of one full sort, and float64 moments, as one would write them down."""
    n = len(a)
    order = np.argsort(a)
    quantiles = [0, 0.5, 0.9, 0.99, 0.999, 1]
    ranks = [
        random.integers(int(low * n), int(high * n), 10) for low, high in zip(quantiles, quantiles[1:], strict=False)
    ]
    ranks += [random.integers(k * n // 12, (k + 1) * n // 12, 20) for k in range(11)]
    positions = np.concatenate([order[-top:], random.integers(0, n, top), *(order[rank] for rank in ranks)])
    windows = a[(positions[:, None] + np.arange(-32, 32)).clip(0, n - 1)]
    central = a.astype(np.float64) - a.mean(dtype=np.float64)
    square = central * central
    moments = square.mean(), (square * central).mean(), (square * square).mean()
    return windows, moments, np.count_nonzero(a) / n, a.max()


if __name__ == "__main__":
    main()
