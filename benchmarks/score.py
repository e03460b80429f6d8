"""Simulating and explaining with SmolLM2-135M, side by side: the plain way and ours.

All-at-once: a shared prefix of instructions and examples as long as OpenAI's, then an excerpt of 64 tokens with a slot
behind each. *plain* runs the full prompt of every excerpt and takes the softmax over the whole vocabulary at all of its
places, as one does with a transformers model. *ours* is `LocalLLM.slot_logprobs`: the prefix computed once (its time is
printed by itself), excerpts in batches, the head at the slots only. Every measurement is a process of its own; the ways
take turns, round after round, and medians are compared. Errors are those of the digits' probabilities against plain
float32. bfloat16 is measured where the hardware multiplies it, or when its way is named.

    python benchmarks/score.py                     # seconds an excerpt, then explaining and list-pmi, one thread
    python benchmarks/score.py --threads 2 --rounds 3
    python benchmarks/score.py --ways plain ours plain-bf16 ours-bf16 --neurons 0
    python benchmarks/score.py --ways plain plain-bf16 ours-bf16 --emulate --rounds 1 --neurons 0   # errors only
    python benchmarks/score.py --ways --neurons 0 --run demo/runs/crate-2l   # every explainer and simulator, as stages

Without bfloat16 units its products take forty times as long as those of float32. `--emulate` computes them in float32
from the same rounded factors and rounds what comes out: errors are those of bfloat16, times are none.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

ALL_AT_ONCE = ("plain", "ours", "plain-bf16", "ours-bf16")
RECORDS = 10
"""Scoring records of a neuron (protocol top-and-random)."""
LAYER = 512
TEXT = Path(__file__).parent.parent / "docs" / "evaluation.md"


@dataclass(frozen=True)
class Options:
    """Measure every way."""

    ways: tuple[str, ...] | None = None
    """Which of plain, ours, plain-bf16, ours-bf16; the last two by default where the hardware has bfloat16."""
    prefix: int = 2500
    """Tokens that all prompts share."""
    excerpt: int = 64
    """Tokens of an excerpt."""
    excerpts: int = 16
    """Excerpts that ours does; plain does a quarter of them."""
    batch: int = 16
    """Prompts in one forward pass of ours."""
    neurons: int = 64
    """Neurons explained and simulated with list-pmi (0: none)."""
    threads: int = 1
    """Threads of every process."""
    run: Path | None = None
    """Run directory with records: also time every explainer and simulator on its neurons and uniform windows."""
    sample: int = 4
    """Neurons a layer of --run that the language model explains and simulates; terms are timed on 16 times as many."""
    rounds: int = 3
    """Measurements of each way."""
    emulate: bool = False
    """Products of bfloat16 factors in float32, rounded afterwards: for errors, where there are no bfloat16 units."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu is the steadier one on a machine that others use too, with one thread."""
    json: Path | None = None
    """Also write the measurements here."""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=140, soft_wrap=True)
    ways = options.ways
    if ways is None:
        ways = tuple(way for way in ALL_AT_ONCE if not way.endswith("bf16") or has_bfloat16())
    rows = measure_all(ways, options)
    if rows:
        show(rows, options, console)
    if options.neurons:
        rows += measure_all(("neurons",), options)
        show_neurons(rows[-1], options, console)
    if options.run:
        rows += measure_all(("stages",), options)
        show_stages(rows[-1], options, console)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def has_bfloat16() -> bool:
    import torch

    from cratescope.hardware import pick_device, pick_dtype

    return pick_dtype("auto", pick_device("auto")) == torch.bfloat16


def measure_all(ways: Sequence[str], options: Options) -> list[dict[str, Any]]:
    """Medians of every way, with the errors of its probabilities."""
    wanted = ("prefix", "excerpt", "excerpts", "batch", "neurons", "threads", "emulate", "sample")
    told = {name: getattr(options, name) for name in wanted} | {"run": str(options.run)}
    answers: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for way in ways:
                answers[way].append(measure(told | {"way": way, "out": str(Path(folder, f"{way}.npy"))}))
        found = {way: np.load(path) for way in ways if (path := Path(folder, f"{way}.npy")).exists()}
    rows = []
    for way, one in answers.items():
        timed = [name for name in one[0] if name.endswith(options.clock)]
        rows.append({"way": way, "clock": options.clock, "threads": options.threads})
        rows[-1] |= {name.removesuffix(f"_{options.clock}"): statistics.median(a[name] for a in one) for name in timed}
        if way in found and "plain" in found:
            rows[-1] |= errors(found[way], found["plain"])
    return rows


def measure(told: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", json.dumps(told)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def errors(found: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """Of log-probabilities (m, digits): largest difference of P; mean and largest KL, both renormalised."""
    n = min(len(found), len(plain))
    ours, theirs = found[:n].astype(np.float64), plain[:n].astype(np.float64)
    largest = np.abs(np.exp(ours) - np.exp(theirs)).max()
    ours, theirs = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (ours, theirs))
    kl = (np.exp(theirs) * (theirs - ours)).sum(1)
    return {"largest": float(largest), "kl": float(kl.mean()), "largest_kl": float(kl.max())}


def show(rows: list[dict[str, Any]], options: Options, console: Console) -> None:
    title = f"all-at-once, SmolLM2-135M, prefix {options.prefix}, excerpts of {options.excerpt} tokens, "
    title += f"{options.threads} thread(s), {options.clock} time, median of {options.rounds}"
    table = Table(title=title)
    names = (
        "way",
        "s/excerpt",
        "s/neuron",
        "x plain",
        "x plain-bf16",
        "prefix once (s)",
        "largest error of P",
        "mean KL",
        "largest KL",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "way" else "right")
    seconds = {row["way"]: row["excerpt"] for row in rows}
    for row in rows:
        ratios = [f"{seconds[way] / row['excerpt']:.1f}" if way in seconds else "" for way in ("plain", "plain-bf16")]
        once = f"{row['once']:.1f}" if row["once"] else ""
        wrong = [f"{row[name]:.1e}" if name in row else "" for name in ("largest", "kl", "largest_kl")]
        table.add_row(row["way"], f"{row['excerpt']:.2f}", f"{RECORDS * row['excerpt']:.1f}", *ratios, once, *wrong)
    console.print(table)


def show_neurons(row: dict[str, Any], options: Options, console: Console) -> None:
    both = row["explain"] + row["simulate"]
    console.print(
        f"explain {row['explain']:.3f} s a neuron, list-pmi {row['simulate']:.3f} s a neuron (batches of "
        f"{options.batch}, {options.threads} thread(s)): {LAYER} neurons in {LAYER * both / 60:.1f} minutes"
    )


def show_stages(row: dict[str, Any], options: Options, console: Console) -> None:
    table = Table("stage", "by", "s/neuron", title=f"{options.run}, uniform windows, {options.threads} thread(s)")
    for name, seconds in row.items():
        stage, _, by = name.partition(" ")
        if by:
            table.add_row(stage, by, f"{seconds:.3f}")
    console.print(table)


# --- one measurement ---


def work(told: dict[str, Any]) -> None:
    """Do it once and say what it took."""
    import torch
    from transformers.utils import logging

    from cratescope.hardware import keep_freed_memory
    from cratescope.llm.config import LLMConfig
    from cratescope.llm.local import LocalLLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(told["threads"])
    keep_freed_memory()
    dtype: Any = "bfloat16" if told["way"].endswith("bf16") else "float32"
    llm = LocalLLM.open(LLMConfig(llm_dtype=dtype))
    do = {"plain": plain, "ours": ours, "stages": stages}.get(told["way"].removesuffix("-bf16"), neurons)
    with torch.inference_mode(), emulated() if told["emulate"] else nullcontext():
        sys.stdout.write(json.dumps(do(told, llm)) + "\n")


def emulated() -> Any:
    """Products and attention of bfloat16 tensors computed in float32, their results rounded."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten, narrow = torch.ops.aten, torch.bfloat16
    products = {aten.mm.default, aten.addmm.default, aten.bmm.default}
    products.add(aten._scaled_dot_product_flash_attention_for_cpu.default)

    def cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
        return value.to(new) if isinstance(value, torch.Tensor) and value.dtype == old else value

    class Emulated(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            named = named or {}
            if operation not in products or given[0].dtype != narrow:
                return operation(*given, **named)
            named = {name: cast(value, narrow, torch.float32) for name, value in named.items()}
            found = operation(*(cast(value, narrow, torch.float32) for value in given), **named)
            # Attention also returns the logarithm of its normalisers, which is float32 in any case.
            return (found[0].to(narrow), *found[1:]) if isinstance(found, tuple) else found.to(narrow)

    return Emulated()


def timed(name: str, start: tuple[float, float], times: int) -> dict[str, float]:
    wall, cpu = start
    return {f"{name}_wall": (time.perf_counter() - wall) / times, f"{name}_cpu": (time.process_time() - cpu) / times}


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def excerpts(told: dict[str, Any], llm: Any) -> tuple[list[int], list[Any], list[int]]:
    """Prefix, one prompt an excerpt of the text, and the ids of the digits."""
    from cratescope.explain.simulators.all_at_once import OwnSlots

    wording, pieces = OwnSlots(), re.findall(r" ?\w+|[^\w\s]", TEXT.read_text())
    prefix = wording.slots_prefix(llm)
    prefix = (prefix * (told["prefix"] // len(prefix) + 1))[: told["prefix"]]
    n = told["excerpt"]
    parts = [pieces[n * place : n * place + n] for place in range(told["excerpts"])]
    prompts = [wording.slot_prompt(llm, "words about language", part) for part in parts]
    return prefix, prompts, [llm.encode(str(digit))[0] for digit in range(10)]


def plain(told: dict[str, Any], llm: Any) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from cratescope.text.offline import smollm2_folder

    prefix, prompts, digits = excerpts(told, llm)
    # `llm` has changed its model's attention and, in bfloat16, what it rounds.
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=getattr(torch, llm.dtype)).eval()
    model(input_ids=torch.tensor([prefix[:64]]))
    found, few = [], prompts[: max(1, len(prompts) // 4)]
    start = now()
    for prompt in few:
        probabilities = model(input_ids=torch.tensor([prefix + prompt.ids])).logits.float().log_softmax(-1)
        found.append(probabilities[0, [len(prefix) + slot - 1 for slot in prompt.slots]][:, digits])
    took = timed("excerpt", start, len(few))
    np.save(told["out"], torch.cat(found).numpy())
    return took | {"once_wall": 0.0, "once_cpu": 0.0}


def ours(told: dict[str, Any], llm: Any) -> dict[str, float]:
    prefix, prompts, digits = excerpts(told, llm)
    if llm.way != "shared":
        raise SystemExit(
            f"{llm.dtype}: the model did not pass the trial of the shared prefix, so copies would be timed"
        )
    start = now()
    llm.next_logprobs(prefix, [prefix[:1]])
    once = timed("once", start, 1)
    llm.slot_logprobs(prefix, [prompts[0].ids], [prompts[0].slots], digits)
    found = []
    start = now()
    for first in range(0, len(prompts), told["batch"]):
        chunk = prompts[first : first + told["batch"]]
        found += llm.slot_logprobs(prefix, [item.ids for item in chunk], [item.slots for item in chunk], digits)
    took = timed("excerpt", start, len(prompts))
    np.save(told["out"], np.concatenate(found))
    return took | once


def neurons(told: dict[str, Any], llm: Any) -> dict[str, float]:
    """Explanations of words drawn from the text, and the list-pmi values of each explanation."""
    from cratescope.explain.simulators.list_pmi import ListPMI
    from cratescope.explain.wording import OwnWording, explain_prompt

    words = re.findall(r"\w+", TEXT.read_text())
    draw = np.random.default_rng(0)
    asked = [llm.encode(explain_prompt(draw.choice(words, 8).tolist())) for _ in range(told["neurons"])]
    prefix, texts = llm.encode(OwnWording().explain_prefix()), []
    start = now()
    for first in range(0, len(asked), told["batch"]):
        texts += llm.generate(prefix, asked[first : first + told["batch"]], 60, "\n")
    explained = timed("explain", start, len(texts))
    # An explanation that two neurons have is simulated once; here all are made different, so this is an upper bound.
    texts = [f"{text.strip()} {place}" for place, text in enumerate(texts)]
    start = now()
    simulator = ListPMI(llm, [], told["batch"])
    simulator.plan(texts)
    for text in texts:
        simulator(text, [])
    return explained | timed("simulate", start, len(texts))


def stages(told: dict[str, Any], llm: Any) -> dict[str, float]:
    """Every explainer and every simulator as users run them, on a copy of the run: files are read and written, too."""
    from cratescope.explain.config import ExplainConfig, SelectedConfig, SimulateConfig, TermsConfig
    from cratescope.explain.explain import explain
    from cratescope.explain.simulate import simulate
    from cratescope.score.config import ScoreConfig
    from cratescope.score.score import score

    few, found = told["sample"], dict[str, float]()
    made = shutil.ignore_patterns("explanations", "simulations", "judgements", "scores", "checkpoints", "milestones")
    with tempfile.TemporaryDirectory() as folder:
        root, other = (
            Path(shutil.copytree(told["run"], Path(folder) / name, ignore=made)) for name in ("run", "other")
        )
        ways: dict[str, Any] = {
            "llm": {"explainer": "llm", "neurons": few},
            "terms": {"explainer": "terms", "neurons": 16 * few},
            "terms with joints": {"explainer": "terms", "neurons": 16 * few, "terms": TermsConfig(joints=True)},
            "selected": {"explainer": "selected", "neurons": few, "selected": SelectedConfig(others=few - 1)},
        }
        for name, options in ways.items():
            config = ExplainConfig(other if "joints" in name else root, protocols=("uniform",), **options)
            start = now()
            (explained,) = explain(config, llm)
            layers = len([*explained.glob("layer-*.parquet")])
            found |= timed(f"explain {name}", start, layers * options["neurons"])
        for simulator in ("list-pmi", "list-in-context", "all-at-once", "terms"):
            by: dict[str, Any] = {"simulator": simulator, "protocols": ("uniform",)}
            by["explainer"] = "terms" if simulator == "terms" else "offline"
            n = layers * (16 * few if simulator == "terms" else few)
            start = now()
            simulate(SimulateConfig(root, **by), llm)
            found |= timed(f"simulate {simulator}", start, n)
            start = now()
            score(ScoreConfig(root, **by))
            found |= timed(f"score {simulator}", start, n)
    return found


if __name__ == "__main__":
    main()
