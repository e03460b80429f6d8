"""Training speed and memory, side by side in one run: plain PyTorch, transformers' GPT-2, torch.compile, and ours.

Every way is a process of its own that takes one training step when told to; the ways take turns, round after round,
and medians are compared, so a machine that slows down slows all of them. A step is forward, backward, clipping and
AdamW on one batch of English text (the docstrings and comments of the standard library). Peak memory is the process's
largest resident size less what it held before the model was built.

    python benchmarks/train.py                    # the table of docs/performance.md
    python benchmarks/train.py --check            # losses of 50 steps: ours against plain, from the same weights
    python benchmarks/train.py --beside           # what a token of each family costs next to GPT-2's, in turns
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

WAYS = {
    "plain": "plain eager float32, ordinary cross-entropy",
    "kept": "the same with freed memory kept (hardware.keep_freed_memory)",
    "compiled": "the same under torch.compile, in ours' number format",
    "hf": "transformers' GPT-2 with its own loss, float32",
    "hf-bf16": "transformers' GPT-2 with its own loss, bfloat16 autocast",
    "ours": "ours",
}


@dataclass(frozen=True)
class Options:
    """Time one training step of every way, in turns."""

    cases: tuple[str, ...] = ("crate-2l:4", "crate-2l:12", "crate-3l:4", "crate-3l:12", "gpt2-2l:4", "crate-s:1")
    """PRESET:BATCH, sequences of `context` tokens in a step."""
    ways: tuple[str, ...] = ("plain", "kept", "compiled", "hf", "hf-bf16", "ours")
    """Which ways, of those that make sense for a case."""
    threads: tuple[int, ...] = (1,)
    """Threads; 0 for all."""
    context: int = 1024
    """Tokens in a sequence."""
    vocabulary: int = 50304
    """Tokens there are; ids beyond wrap around."""
    rounds: int = 5
    """Timed steps of each way, after one that is not counted."""
    check: bool = False
    """Compare the losses of `check_steps` steps instead."""
    check_steps: int = 50
    """Steps compared."""
    beside: bool = False
    """Compare families as we train them instead: time per token by that of the first of `families`."""
    families: tuple[str, ...] = (
        *("gpt2-2l:4", "crate-h-2l:4", "crate-h-lag-2l:4", "crate-h-lag-2l+bilinear:4", "gpt2-lag-2l:4", "gpt2-h-2l:4"),
    )
    """PRESET:BATCH of those; PRESET+FIELD:BATCH with a field of CRATE that is true."""
    device: str = "cpu"
    """Where to train."""
    json: Path | None = None
    """Also write the measurements here."""
    text: tyro.conf.Suppress[Path] = Path()
    """Token ids that the workers read; made by the driver."""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=140, soft_wrap=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # Read here once: a worker that tokenised would hold memory that is not the training step's.
        options = dataclasses.replace(options, text=Path(folder) / "text.npy")
        write_text(options.text)
        run(options, console, rows)


def run(options: Options, console: Console, rows: list[dict[str, Any]]) -> None:
    for threads in options.threads:
        if options.beside:
            rows += compare_families(threads, options, console)
            write(rows, options)
            continue
        for case in options.cases:
            if options.check:
                check(case, threads, options, console)
            else:
                rows += compare(case, threads, options, console)
                write(rows, options)


def write(rows: list[dict[str, Any]], options: Options) -> None:
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


# --- the driver ---


class Worker:
    """One way in a process of its own."""

    def __init__(self, way: str, case: str, threads: int, options: Options) -> None:
        preset, _, batch = case.partition(":")
        told = {"way": way, "preset": preset, "batch": int(batch), "threads": threads}
        told |= {"context": options.context, "device": options.device, "text": str(options.text)}
        told |= {"vocabulary": options.vocabulary}
        command = [sys.executable, __file__, "--worker", json.dumps(told)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.hear()

    def hear(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        self.process.stdin.write("step\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self.hear()

    def stop(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def sensible(way: str, preset: str, native_bf16: bool) -> bool:
    """Transformers' own loss is the rival of its own model; emulated bfloat16 says nothing about bfloat16."""
    return preset.startswith("gpt2") and (native_bf16 or way != "hf-bf16") if way.startswith("hf") else True


def compare(case: str, threads: int, options: Options, console: Console) -> list[dict[str, Any]]:
    from cratescope.hardware import pick_device, pick_dtype

    dtype = str(pick_dtype("auto", pick_device(options.device))).removeprefix("torch.")
    ways = [way for way in options.ways if sensible(way, case, dtype == "bfloat16")]
    workers = {way: Worker(way, case, threads, options) for way in ways}
    answers: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(options.rounds + 1):
        for way, worker in workers.items():
            answer = worker.step()
            if number:
                answers[way].append(answer)
    table = Table(title=f"{case} x {options.context}, {threads or 'all'} thread(s), {dtype}")
    for name in ("way", "seconds", "tokens/s", "x plain", "x kept", "net peak GB", "share of GEMM peak"):
        table.add_column(name, justify="left" if name == "way" else "right")
    rows = []
    for way in ways:
        seconds = statistics.median(answer["seconds"] for answer in answers[way])
        rows.append({"case": case, "threads": threads, "context": options.context, "way": way, "seconds": seconds})
        rows[-1] |= {"dtype": answers[way][-1]["dtype"], "tokens_per_second": workers[way].ready["tokens"] / seconds}
        rows[-1] |= {"net_peak_bytes": answers[way][-1]["peak"] - workers[way].ready["before"]}
        rows[-1] |= {"flops_per_second": workers[way].ready["flops"] / seconds}
    for worker in workers.values():
        worker.stop()
    peaks = {dtype: gemm_peak(dtype, threads, options) for dtype in {row["dtype"] for row in rows}}
    by_way = {row["way"]: row for row in rows}
    for row in rows:
        row["share_of_peak"] = row["flops_per_second"] / peaks[row["dtype"]]
        ratios = [f"{by_way[of]['seconds'] / row['seconds']:.2f}" if of in by_way else "" for of in ("plain", "kept")]
        figures = [f"{row['seconds']:.3f}", f"{row['tokens_per_second']:,.0f}", *ratios]
        figures += [f"{row['net_peak_bytes'] / 1e9:.2f}", f"{row['share_of_peak']:.0%} of {row['dtype']}"]
        table.add_row(WAYS[row["way"]], *figures)
    console.print(table)
    return rows


def compare_families(threads: int, options: Options, console: Console) -> list[dict[str, Any]]:
    """Ratios are medians over rounds, in each of which every family takes a step."""
    workers = {case: Worker("ours", case, threads, options) for case in options.families}
    taken: dict[str, list[float]] = {case: [] for case in workers}
    for number in range(options.rounds + 1):
        for case, worker in workers.items():
            answer = worker.step()
            if number:
                taken[case].append(answer["seconds"] / worker.ready["tokens"])
    what = f"{options.context}, vocabulary {options.vocabulary:,}, {threads or 'all'} thread(s), {answer['dtype']}"
    table, rows = Table(title=f"training x {what}"), []
    for name in ("family", "microseconds/token", f"x {options.families[0]}"):
        table.add_column(name, justify="left" if name == "family" else "right")
    for case, seconds in taken.items():
        workers[case].stop()
        ratio = statistics.median(mine / first for mine, first in zip(seconds, taken[options.families[0]], strict=True))
        rows.append({"case": case, "threads": threads, "context": options.context, "vocabulary": options.vocabulary})
        rows[-1] |= {"seconds_per_token": statistics.median(seconds), "by_first": ratio, "dtype": answer["dtype"]}
        table.add_row(case, f"{1e6 * rows[-1]['seconds_per_token']:.1f}", f"{ratio:.3f}")
    console.print(table)
    return rows


def gemm_peak(dtype: str, threads: int, options: Options) -> float:
    """Measured with the machine to itself: the workers have stopped."""
    code = (
        "import torch, sys; from cratescope.hardware import gemm_peak; torch.set_num_threads(int(sys.argv[1]) or "
        "torch.get_num_threads()); print(max(gemm_peak(torch.device(sys.argv[3]), getattr(torch, sys.argv[2])) "
        "for _ in range(3)))"
    )
    command = [sys.executable, "-c", code, str(threads), dtype, options.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check(case: str, threads: int, options: Options, console: Console) -> None:
    workers = [Worker(way, case, threads, options) for way in ("plain", "ours")]
    losses = [[worker.step()["loss"] for _ in range(options.check_steps)] for worker in workers]
    for worker in workers:
        worker.stop()
    largest = max(abs(ours - plain) for plain, ours in zip(*losses, strict=True))
    console.print(f"{case}: losses {losses[0][0]:.4f} to {losses[0][-1]:.4f}; largest difference {largest:.2e}")


# --- one way ---


def work(told: dict[str, Any]) -> None:
    """Take a training step for every line on standard input, and say what it took."""
    import torch

    from cratescope.hardware import keep_freed_memory, pick_device, pick_dtype
    from cratescope.lm.loss import fuse
    from cratescope.models.cost import flops_per_token
    from cratescope.models.presets import build, preset_config

    torch.set_num_threads(told["threads"] or torch.get_num_threads())
    way, device = told["way"], pick_device(told["device"])
    if way in ("ours", "kept"):
        keep_freed_memory()
    bf16 = way == "hf-bf16" or (way in ("ours", "compiled") and pick_dtype("auto", device) == torch.bfloat16)
    crops = batches(told["text"], told["batch"], told["context"])
    next(crops)
    before = resident()
    preset, *fields = told["preset"].split("+")
    config = preset_config(preset, told["vocabulary"], told["context"], None, dict.fromkeys(fields, "true"))
    model = build(config, seed=0).to(device).train()
    if way == "ours":
        penalty = getattr(config, "code_penalty", 0.0)
        forward = fuse(model, (lambda activations: penalty * activations) if penalty else None)
    else:
        plain_ista(model)
        forward = torch.compile(model) if way == "compiled" else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True if way == "ours" else None
    )
    tokens = told["batch"] * told["context"]
    say({"before": before, "tokens": tokens, "flops": tokens * flops_per_token(config, told["context"])})
    for _ in sys.stdin:
        batch = torch.from_numpy(next(crops) % told["vocabulary"]).to(device)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(way, forward, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if hasattr(model, "regulate"):
            model.regulate()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        seconds = time.perf_counter() - start
        say({"seconds": seconds, "loss": value, "peak": peak(device), "dtype": "bfloat16" if bf16 else "float32"})


def loss_of(way: str, forward: Any, batch: Any) -> Any:
    from torch.nn import functional as F

    if way == "ours" or way.startswith("hf"):
        return forward(batch, labels=batch).loss
    logits = forward(batch, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))


def plain_ista(model: Any) -> None:
    """The readable loop instead of the fused operation: a hook that does nothing asks for it."""
    for module in model.modules():
        if hasattr(module, "first_codes"):
            module.codes.register_forward_hook(lambda *_: None)


def write_text(path: Path) -> None:
    """Token ids of the standard library's sources."""
    from cratescope.text.tokenizer import load_tokenizer

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    joined = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in sources[:60])
    np.save(path, np.array(load_tokenizer("gpt2").backend_tokenizer.encode(joined).ids))


def batches(path: str, batch: int, context: int) -> Iterator[np.ndarray]:
    """Random crops, the same for every way."""
    ids = np.load(path)
    chance = np.random.default_rng(0)
    while True:
        yield np.stack([ids[start : start + context] for start in chance.integers(0, len(ids) - context, batch)])


def resident() -> int:
    """Bytes resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device: Any) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
