"""Settings of `train` and `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cratescope.arm import Arm
from cratescope.errors import UserError
from cratescope.options import LARGEST_BATCH, LARGEST_SEED, Checked, PositionalPath, within

# What a smaller budget changes: fewer tokens per step, and the higher learning rate that small models then take.
_SMALL: dict[str, Any] = {
    **{"micro_batch": 16, "context": 256, "learning_rate": 2e-3, "min_learning_rate": 2e-4},
    **{"validate_every": 100, "save_every": 100},
}
BUDGETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "hour": {"steps": 1500, "batch_tokens": 16_384, "warmup_steps": 100, **_SMALL},
    "minutes": {"steps": 500, "batch_tokens": 4096, "warmup_steps": 50, **_SMALL},
}


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Train one language model with the paper's recipe (section 3) and write it as a Hugging Face checkpoint."""

    budgets = BUDGETS

    out: Annotated[Path, tyro.conf.Positional]
    """Run directory to write; the same command resumes from the last complete checkpoint."""
    data: Path
    """Folder made by `cratescope prepare`."""
    budget: Literal["paper", "hour", "minutes"] = "paper"
    """Sets the defaults of the options below: the paper's recipe, or about 25 or 2 million tokens for a CPU."""
    preset: str = "crate-2l"
    """A family (crate, crate-lag, crate-h, crate-h-lag, or gpt2, gpt2-lag, gpt2-h, gpt2-h-lag; docs/math.md) and a size
    (1l, 2l, 3l, s, b), such as crate-2l; the vocabulary size comes from the data."""
    steps: Annotated[int, within(0)] = 600_000
    """Total optimiser steps. 0 writes the untrained model (a control)."""
    batch_tokens: Annotated[int, within(1)] = 491_520
    """Tokens per optimiser step, over all devices (paper: 12 x 1024 x 40)."""
    micro_batch: Annotated[int, within(1, LARGEST_BATCH)] = 12
    """Crops per forward pass on one device; gradient accumulation makes up the rest of batch_tokens."""
    context: Annotated[int, within(2)] = 1024
    """Tokens per crop, which is also the model's longest context."""
    learning_rate: Annotated[float, within(0, above=True)] = 6e-4
    """Peak learning rate, reached after the warm-up."""
    min_learning_rate: Annotated[float, within(0)] = 6e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: Annotated[int, within(0)] = 2000
    """Linear warm-up steps."""
    weight_decay: Annotated[float, within(0)] = 0.1
    """Applied only to tensors with two or more dimensions."""
    adam_betas: Annotated[tuple[float, float], within(0, 1, below=True)] = (0.9, 0.95)
    """AdamW momentum and second-moment decay."""
    clip: Annotated[float, within(0)] = 1.0
    """Largest gradient norm (0: gradients are not clipped)."""
    validate_every: Annotated[int, within(0)] = 1000
    """Steps between validations (0: only at the end)."""
    validation_crops: Annotated[int, within(1)] = 64
    """Crops of the validation split read each time, evenly spaced over it."""
    log_every: Annotated[int, within(1)] = 10
    """Steps between lines of metrics.jsonl."""
    save_every: Annotated[int, within(1)] = 1000
    """Steps between checkpoints."""
    keep: Annotated[int, within(2)] = 2
    """Number of latest checkpoints to keep; with two, one is left if the newest is damaged."""
    milestones: Annotated[tuple[float, ...], within(0, 1, above=True)] = ()
    """Fractions of the steps, such as 0.1 0.5, at which the model is kept as a run of its own in RUN/milestones."""
    sampling: Literal["random", "packed"] = "random"
    """Crops that start anywhere (paper), or that share no token until all tokens have been read."""
    workers: Annotated[int, within(0, 256)] = 0
    """Processes that prefetch crops for each training process (0: it reads its own)."""
    fsdp: bool = False
    """Shard weights and optimiser over the processes (FSDP) instead of copying them to each (DDP)."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log to these services; each needs its own package. metrics.jsonl is always written."""
    l1: Annotated[float | None, within(0, 1, above=True)] = None
    """Also minimise so many times the sum of a token's activations, over all neurons; by default the preset's
    code_penalty (0.001 of crate-h-, gpt2-h-, else none; for none there, `--crate code_penalty 0`). The weight grows
    over a fifth of the steps. No loss that is shown or logged includes it."""
    crate: dict[str, str] = field(default_factory=dict)
    """Overrides of CRATE config fields (docs/math.md), such as `--crate ista_steps 3 ista_lambda 0.2` or `--crate
    bilinear true reconstruction_weight 3`."""
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seed of the initial weights and of the crops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 means autocast with float32 weights; auto uses it where the hardware supports it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"--min-learning-rate {self.min_learning_rate}: is more than --learning-rate {self.learning_rate}; "
                "the cosine ends at it, so give a smaller one"
            )
        for name in ("save_every", "validate_every"):
            if getattr(self, name) % self.log_every:
                value = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UserError(f"{value}: is not a multiple of --log-every {self.log_every}; change one of them")

    def penalty_of(self, model_config: Any) -> float:
        """What a token's activations weigh in the loss; UserError if something weighs within no penalty."""
        weight: float = getattr(model_config, "code_penalty", 0.0) if self.l1 is None else self.l1
        if not weight and getattr(model_config, "reconstruction_weight", False):
            raise UserError(
                "--crate reconstruction_weight: weighs within a penalty, and there is none; give --l1 as well"
            )
        return weight

    def arm(self, step: int) -> Arm:
        """What the run is after so many steps: a penalty of its own makes it another arm than its preset, too."""
        overrides = self.crate | ({"l1": f"{self.l1:g}"} if self.l1 else {})
        return Arm.trained(self.preset, self.seed, step * self.batch_tokens, overrides)


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    """Loss, perplexity and bits per byte with standard errors on any text, lm-eval tasks, and next-token examples."""

    run: PositionalPath
    """Run directory with a trained model."""
    data: Path | None = None
    """Folder made by `cratescope prepare`; the run's own by default."""
    on: tuple[str, ...] = ()
    """Text to evaluate on besides the validation split: heldout, a text file or folder (.txt .md .jsonl .parquet .gz
    .zst), a hub data set by name (pile, openwebtext, lambada, wikitext, ptb), or a local copy of one (lambada=FILE)."""
    sae: tuple[str, ...] = ()
    """Names of sparse autoencoders of the run: also measure how well they reconstruct activations and keep the model's
    predictions, how often their features are active and what these tell of the text (RUN/saes/NAME/quality.json)."""
    crops: Annotated[int, within(1)] = 256
    """Crops of --context tokens read from a split, evenly spaced over it."""
    context: Annotated[int | None, within(2)] = None
    """Tokens per crop: by default the model's longest context, at most 4096; required if the model states none."""
    max_documents: Annotated[int, within(1)] = 6000
    """Documents read from the start of a file or hub set (LAMBADA has 5,153)."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks, such as lambada_openai,wikitext (pip install 'cratescope[eval]')."""
    task_folder: Path | None = None
    """Folder with YAML files of your own lm-eval tasks, for use in --tasks."""
    batch_size: Annotated[int, within(1, LARGEST_BATCH)] = 8
    """Crops per forward pass; other text is batched to the same number of tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run the model on."""

    def task_names(self) -> list[str]:
        """List the tasks, which may be separated by spaces or commas."""
        return [name for part in self.tasks for name in part.split(",") if name]
