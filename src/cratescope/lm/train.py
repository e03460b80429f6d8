"""Training on transformers' Trainer with the paper's recipe (section 3), resumable to the last whole checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from cratescope.config import TrainConfig
from cratescope.hardware import pick_device, pick_dtype
from cratescope.lm.data import TokenData, TokenSplit
from cratescope.lm.evaluate import crop_losses, mean_loss
from cratescope.models.presets import build, count_parameters, preset_config
from cratescope.run import (
    Run,
    UserError,
    atomic_folder,
    claim,
    read_jsonl,
    sha256,
    versions,
    write_json,
    write_text,
)

WHOLE = "whole.json"
"""Written last into a checkpoint: the sizes of its files. A checkpoint without it was cut short."""
NOT_IDENTITY = ("budget", "out", "data", "device", "dtype", "keep", "micro_batch", "log_every", "save_every")
"""Settings that may change between a run and its resumption."""


class RandomCrops(Dataset):
    """Uniformly random crops; crop i depends on (seed, i) alone, so any worker and any resumed run reads the same."""

    def __init__(self, split: TokenSplit, context: int, seed: int, length: int) -> None:
        if split.n_tokens < context:
            raise UserError(f"the train split has {split.n_tokens} tokens, fewer than one crop of {context}")
        self.split, self.context, self.seed, self.length = split, context, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Int[np.ndarray, " t"]]:
        start = np.random.default_rng([self.seed, index]).integers(0, self.split.n_tokens - self.context + 1)
        tokens = self.split.window(int(start), self.context)
        return {"input_ids": tokens, "labels": tokens}


def train(config: TrainConfig) -> Run:
    """Train one model and write the run directory; finished work is skipped.

    Raises:
        UserError: settings that do not fit together, or a run directory of another model.
    """
    run = Run(config.out)
    data = TokenData.open(config.data)
    if run.manifest.exists():
        claim(run.root, _identity(config, data))
        return run
    started = time.monotonic()
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    _check(config, data)
    model_config = preset_config(config.preset, data.vocab_size, config.context, data.eos_id, config.crate)
    # Only now: a refused command must not claim the folder for its mistake.
    claim(run.root, _identity(config, data))
    model = build(model_config, config.seed)
    console = Console(stderr=True)
    console.print(f"{run.name}: {config.preset}, {count_parameters(model):,} parameters, {device.type}, {dtype}")
    if config.steps:
        _fit(config, run, model, data, device, bf16=dtype == torch.bfloat16)
    _finish(config, run, model, data, time.monotonic() - started)
    return run


def _identity(config: TrainConfig, data: TokenData) -> dict[str, Any]:
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IDENTITY}
    return settings | {"data_sha256": sha256(data.path / "manifest.json")}


def _fit(
    config: TrainConfig, run: Run, model: PreTrainedModel, data: TokenData, device: torch.device, bf16: bool
) -> None:
    log = _Log(config, run, data.split("validation"))
    trainer = Trainer(
        model=model,
        args=_arguments(config, run, device, bf16),
        train_dataset=_crops(config, data),
        callbacks=[log],
    )
    for unwanted in (c for c in list(trainer.callback_handler.callbacks) if type(c).__name__ == "PrinterCallback"):
        trainer.remove_callback(unwanted)
    last = last_whole_checkpoint(run.checkpoints)
    step = int(last.name.rpartition("-")[2]) if last else 0
    rows = [row for row in read_jsonl(run.metrics) if row["step"] <= step]
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        log.progress.stop()


def _crops(config: TrainConfig, data: TokenData) -> RandomCrops:
    length = config.steps * config.batch_tokens // config.context
    return RandomCrops(data.split("train"), config.context, config.seed, length)


def _check(config: TrainConfig, data: TokenData) -> None:
    """Refuse settings that do not fit together before anything is written.

    Raises:
        UserError: too little text; batch_tokens is no multiple of what one forward pass reads; a checkpoint would fall
            between two lines of the log (whose loss is a mean since the line before); several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training in several processes is not supported yet; start one process")
    a_pass = config.micro_batch * config.context
    if config.batch_tokens % a_pass:
        raise UserError(
            f"batch_tokens = {config.batch_tokens} is no multiple of micro_batch x context = "
            f"{config.micro_batch} x {config.context} = {a_pass}; change one of them"
        )
    if config.steps < 0 or config.learning_rate <= 0:
        raise UserError(f"steps = {config.steps}, learning_rate = {config.learning_rate}: give numbers above 0")
    for name in ("save_every", "validate_every"):
        if getattr(config, name) % config.log_every:
            raise UserError(f"{name} = {getattr(config, name)} is no multiple of log_every = {config.log_every}")
    if config.keep < 2:
        raise UserError(f"keep = {config.keep}: at least 2, so that one whole checkpoint is left while one is written")
    _crops(config, data)
    data.split("validation").spaced(1, config.context)


def _arguments(config: TrainConfig, run: Run, device: torch.device, bf16: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.batch_tokens // (config.micro_batch * config.context),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate / config.learning_rate},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_betas[0],
        adam_beta2=config.adam_betas[1],
        max_grad_norm=config.clip,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        # The crops are random already; reading them in order is what makes a resumed run read the same ones.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=config.keep,
        report_to=[],
        disable_tqdm=True,
        label_names=["labels"],
    )
    # Several GPUs in one process would each read a micro-batch of their own, unseen by the count of tokens.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Log(TrainerCallback):
    """Progress bar, metrics.jsonl, validation loss, and the mark of a whole checkpoint."""

    def __init__(self, config: TrainConfig, run: Run, validation: TokenSplit) -> None:
        self.config, self.run = config, run
        wanted = min(config.validation_crops, validation.n_tokens // config.context)
        self.crops = validation.spaced(max(wanted, 1), config.context)
        columns = (TextColumn("train {task.fields[name]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        loss = TextColumn("loss {task.fields[loss]}")
        self.progress = Progress(*columns, loss, console=Console(stderr=True), transient=True)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.progress.start()
            self.task = self.progress.add_task(
                "", name=self.run.name, total=state.max_steps, completed=state.global_step, loss="-"
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            self._append(state, {key: logs[key] for key in ("loss", "learning_rate", "grad_norm")})
            self.progress.update(self.task, loss=f"{logs['loss']:.3f}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        self.progress.update(self.task, completed=state.global_step)
        every = self.config.validate_every
        if (every and state.global_step % every == 0) or state.global_step == state.max_steps:
            loss = mean_loss(crop_losses(model, self.crops, self.config.micro_batch), self.config.context)
            self._append(state, {"validation_loss": loss.mean, "validation_standard_error": loss.standard_error})

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = self.run.checkpoints / f"checkpoint-{state.global_step}"
            write_json(folder / WHOLE, {file.name: file.stat().st_size for file in sorted(folder.iterdir())})

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.stop()

    def _append(self, state, values: dict[str, float | None]) -> None:
        row = {"step": state.global_step, "tokens": state.global_step * self.config.batch_tokens}
        row |= {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        with open(self.run.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint all of whose files have the size they had when it was finished; others are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            sizes = json.loads((path / WHOLE).read_text())
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return path
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        Console(stderr=True, soft_wrap=True).print(f"[yellow]{path} was cut short; using the checkpoint before it")
        shutil.rmtree(path)
    return None


def _finish(config: TrainConfig, run: Run, model: PreTrainedModel, data: TokenData, seconds: float) -> None:
    """Write the model with its tokenizer, then run.json, which says that training is done."""
    with atomic_folder(run.model) as folder:
        model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    write_json(
        run.manifest,
        {
            "name": run.name,
            "family": config.preset.partition("-")[0],
            "preset": config.preset,
            "seed": config.seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_without_positions": count_parameters(model),
            "n_layer": model.config.n_layer,
            "n_neurons": 4 * model.config.n_embd if config.preset.startswith("gpt2") else model.config.n_atoms,
            "vocab_size": data.vocab_size,
            "context": config.context,
            "steps": config.steps,
            "tokens_trained": config.steps * config.batch_tokens,
            "data": {
                # From the run's folder, so that a study can be moved as a whole.
                "path": os.path.relpath(data.path, run.root),
                "manifest_sha256": sha256(data.path / "manifest.json"),
            },
            "settings": settings,
            "versions": versions(),
            "seconds": round(seconds, 1),
        },
    )
