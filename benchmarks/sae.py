"""Speed and memory of learning sparse autoencoders, side by side in one run: SAELens' trainer, plain PyTorch, and ours.

Every way is a process of its own that takes a training step on the same planted activations when told to; the ways take
turns, and medians of processor time are compared. A step is forward, backward, clipping and Adam on one batch. Steps
before the timed ones bring `relu` to its usual sparsity. Memory is the largest resident size less what the process held
before the coder was made; the share of peak is dense work (12 d m operations a token) over that of a large product.

    python benchmarks/sae.py --saelens saeenv/bin/python     # SAELens needs an environment of its own
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """Time one training step of every way, in turns."""

    cases: tuple[str, ...] = ("512:8192", "768:24576")
    """d_in:width."""
    ways: tuple[str, ...] = ("saelens", "plain", "ours", "ours-float32", "ours-grid")
    """plain is autograd of the same loss in float32; ours-grid is four coders on the same batches."""
    kind: str = "batchtopk"
    """Kind of all of them."""
    k: int = 32
    """Active features per token."""
    batch: int = 4096
    """Tokens in a step."""
    warm: int = 3
    """Steps before the timed ones."""
    rounds: int = 5
    """Timed steps of each way."""
    threads: int = 1
    """Threads of each."""
    saelens: str = ""
    """Python with sae-lens; without one that way is left out."""
    json: Path | None = None
    """Also write the measurements here."""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    import tyro  # SAELens' environment has none

    options = tyro.cli(Options, description=__doc__)
    rows = [row for case in options.cases for row in compare(case, options)]
    for row in rows:
        print(" ".join(f"{name} {value}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


class Worker:
    """One way in a process of its own."""

    def __init__(self, way: str, case: str, options: Options) -> None:
        told = {"way": way, "case": case, "kind": options.kind, "k": options.k, "batch": options.batch}
        python = options.saelens if way == "saelens" else sys.executable
        command = [python, __file__, "--worker", json.dumps(told | {"threads": options.threads})]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        """Take a step; returns its seconds of processor time, its loss and the memory so far."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}")
        return json.loads(line)

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compare(case: str, options: Options) -> list[dict[str, Any]]:
    ways = [way for way in options.ways if way != "saelens" or options.saelens]
    workers = {way: Worker(way, case, options) for way in ways}
    steps: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(options.warm + options.rounds):
        for way, worker in workers.items():
            found = worker.step()
            if number >= options.warm:
                steps[way].append(found)
    for worker in workers.values():
        worker.stop()
    d, m = map(int, case.split(":"))
    rows: list[dict[str, Any]] = []
    for way, found in steps.items():
        coders = 4 if way.endswith("grid") else 1
        speed = coders * options.batch / statistics.median(step["seconds"] for step in found)
        row = {"case": case, "kind": options.kind, "way": way, "tokens_per_second": round(speed)}
        row |= {"share_of_peak": round(speed * 12 * d * m / found[-1]["peak"], 3)}
        rows.append(row | {"gigabytes": round(max(step["gigabytes"] for step in found), 2), "loss": found[-1]["loss"]})
    if "saelens" in ways:
        first = rows[0]["tokens_per_second"]
        rows = [row | {"ratio": round(row["tokens_per_second"] / first, 2)} for row in rows]
    return rows


# --- the workers ---


def work(told: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(told["threads"])
    d, m = map(int, told["case"].split(":"))
    peak = gemm_peak()
    before = memory()
    step = {"saelens": of_saelens, "plain": of_plain}.get(told["way"], of_ours)(told, d, m)
    for number, _ in enumerate(sys.stdin):
        x = batch(told["batch"], d, number)
        start = time.process_time()
        loss = step(x)
        seconds = time.process_time() - start
        found = {"seconds": seconds, "loss": round(loss, 3), "gigabytes": memory() - before, "peak": peak}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


def memory() -> float:
    """Largest resident size so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def batch(n: int, d: int, number: int) -> Any:
    """Twelve of 2048 atoms per token, scaled to a mean squared norm of d."""
    import torch

    atoms = torch.nn.functional.normalize(torch.randn(2048, d, generator=torch.Generator().manual_seed(0)), dim=1)
    chance = torch.Generator().manual_seed(number + 1)
    chosen = torch.randint(0, 2048, (n, 12), generator=chance)
    strengths = torch.rand(n, 12, generator=chance)
    x = torch.nn.functional.embedding_bag(chosen, atoms, mode="sum", per_sample_weights=strengths)
    return x * (d / x.square().sum(1).mean()) ** 0.5


def gemm_peak() -> float:
    """Best float32 and bfloat16 speed of a product of 1024 x 1024 matrices, operations per second."""
    import torch

    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
        for _ in range(20):
            start = time.perf_counter()
            left @ right
            best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best


def of_saelens(told: dict[str, Any], d: int, m: int) -> Any:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    makers = {
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    }
    if told["kind"] not in makers:
        raise SystemExit(f"kind {told['kind']}: SAELens is timed for {', '.join(makers)}")
    make, settings = makers[told["kind"]]
    sae: Any = make(settings(d_in=d, d_sae=m, k=told["k"]))
    logger = LoggingConfig(log_to_wandb=False)
    schedule: dict[str, Any] = {"lr": 1e-3, "lr_end": 1e-3, "lr_scheduler_name": "constant", "lr_warm_up_steps": 0}
    schedule |= {"lr_decay_steps": 0, "n_restart_cycles": 1, "adam_beta1": 0.9, "adam_beta2": 0.999}
    rest: dict[str, Any] = {"device": "cpu", "autocast": False, "dead_feature_window": 1000, "n_checkpoints": 0}
    rest |= {"feature_sampling_window": 10**6, "checkpoint_path": None, "save_final_checkpoint": False}
    size = {"total_training_samples": 10**9, "train_batch_size_samples": told["batch"]}
    trainer: Any = SAETrainer(
        SAETrainerConfig(**size, **schedule, **rest, n_batches_for_norm_estimate=1, logger=logger), sae, iter(())
    )
    return lambda x: trainer.step(x).loss.item()


def of_plain(told: dict[str, Any], d: int, m: int) -> Any:
    import torch

    from cratescope.models.sae import CoderConfig, SparseCoder
    from cratescope.sae.loss import losses

    coder = SparseCoder(CoderConfig(told["kind"], d, m, told["k"]))
    adam = torch.optim.Adam(coder.parameters(), lr=1e-3)
    dead = torch.zeros(m, dtype=torch.bool)

    def step(x: Any) -> float:
        loss = losses(coder, x, dead).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step


def of_ours(told: dict[str, Any], d: int, m: int) -> Any:
    import torch

    from cratescope.hardware import keep_freed_memory, pick_dtype
    from cratescope.models.sae import CoderConfig, SparseCoder
    from cratescope.sae.learner import Learner, Plan

    keep_freed_memory()
    dtype = torch.float32 if told["way"] == "ours-float32" else pick_dtype("auto", torch.device("cpu"))
    plan = Plan(10**6, 1e-3, warmup=0, dead_after=1000, dtype=dtype)
    n = 4 if told["way"].endswith("grid") else 1
    learners = [Learner(SparseCoder(CoderConfig(told["kind"], d, m, told["k"]), seed=seed), plan) for seed in range(n)]
    return lambda x: [learner.step(x).loss for learner in learners][0]


if __name__ == "__main__":
    main()
