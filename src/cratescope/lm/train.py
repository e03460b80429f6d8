"""Train with transformers' Trainer and the paper's recipe (section 3), in any number of processes, resumably."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainingArguments

from cratescope.errors import Stopped, UserError
from cratescope.files import atomic_folder, mark_whole, read_jsonl, sha256, write_json, write_text
from cratescope.hardware import pick_device, pick_dtype
from cratescope.lm.checkpoints import last_whole_checkpoint, step_of
from cratescope.lm.config import TrainConfig
from cratescope.lm.loss import fuse
from cratescope.lm.trainer import Watch, WatchedTrainer, milestone_steps
from cratescope.locks import locked
from cratescope.models.cost import count_parameters
from cratescope.models.folder import load_folder
from cratescope.models.presets import build, preset_config
from cratescope.progress import say
from cratescope.run import METRICS, Run, claim, versions
from cratescope.text.crops import Crops
from cratescope.text.shards import TokenData
from cratescope.text.tokenizer import n_ids
from cratescope.workers import processes, rank

NOT_IDENTITY = (
    *("budget", "out", "data", "device", "dtype", "keep", "micro_batch", "log_every", "save_every"),
    *("milestones", "workers", "report_to"),
)
"""Settings that may change between a run and its resumption."""


def train(config: TrainConfig) -> Run:
    """Train one model and write the run directory; finished work is skipped.

    Under torchrun or `accelerate launch` all processes call this together; number 0 writes the files.

    Raises:
        UserError: inconsistent settings, a run directory of another model, or a loss that is not a number.
        Stopped: on SIGTERM or SIGINT, after finishing the current step and writing a checkpoint.
    """
    run = Run(config.out)
    data = TokenData.open(config.data)
    if run.manifest.exists():
        _check_same(config, run, data)
        return run
    started = time.monotonic()
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    _check(config, data, device)
    model_config = preset_config(config.preset, data.vocab_size, config.context, data.eos_id, config.crate)
    weight = config.penalty_of(model_config)
    # Only now: a refused command must not claim the folder.
    with locked(run.root, "train") if rank() == 0 else contextlib.nullcontext():
        if rank() == 0:
            claim(run.root, _identity(config, data))
        model = build(model_config, config.seed)
        publish = functools.partial(_publish, config, data, started)
        together = f" x {processes()} processes" if processes() > 1 else ""
        what = f"{config.preset}, {count_parameters(model):,} parameters, {device.type}{together}, {dtype}"
        if rank() == 0:
            say(f"{run.name}: {what}")
        if config.steps:
            number, step = _fit(config, run, model, data, _arguments(config, run, device, dtype), weight, publish)
            _leave_group()
            if number:
                what = f"{run.root}: stopped by {signal.Signals(number).name} after step {step}, which is saved"
                raise Stopped(f"{what}; the same command resumes from there", number)
        elif rank() == 0:
            publish(0, model)
    return run


def _check_same(config: TrainConfig, run: Run, data: TokenData) -> None:
    """Refuse a finished model that is another than asked for, or that was not trained into this folder at all."""
    fix = "use it as it is, or name another folder for a new one"
    if not (run.root / "manifest.json").exists():
        raise UserError(f"{run.root}: holds a model that was not trained there; {fix}")
    claim(run.root, _identity(config, data), f"its model is trained already; {fix}")


def _identity(config: TrainConfig, data: TokenData) -> dict[str, Any]:
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IDENTITY}
    return settings | {"data_sha256": sha256(data.path / "manifest.json")}


def _fit(
    config: TrainConfig,
    run: Run,
    model: PreTrainedModel,
    data: TokenData,
    arguments: TrainingArguments,
    weight: float,
    publish: Callable[[int, PreTrainedModel], None],
) -> tuple[int, int]:
    """Train from the newest good checkpoint and publish the run; return the signal received, if any, and the step."""
    watch = Watch(config, run, weight, publish)
    validation = data.split("validation")
    n_crops = max(1, min(config.validation_crops, validation.n_tokens // config.context))
    given: dict[str, Any] = {
        "model": fuse(model, watch.penalty if weight else None),
        "args": arguments,
        "train_dataset": _crops(config, data),
    }
    trainer = WatchedTrainer(watch, validation.spaced(n_crops, config.context), **given)
    last = _resume(run, config) if rank() == 0 else None
    (last,) = broadcast_object_list([last])
    watch.last = last
    with watch.watching():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.state.global_step == config.steps and rank() == 0:
        publish(config.steps, load_folder(run.checkpoints / f"checkpoint-{config.steps}"))
    return watch.signal or watch.asked.signal, trainer.state.global_step


def _leave_group() -> None:
    """Leave the process group once process 0 has written everything."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # DDP has to go before its group: the last to go waits for the group's threads, and DDP does so holding the
        # lock that they need.
        gc.collect()
        torch.distributed.destroy_process_group()


def _resume(run: Run, config: TrainConfig) -> Path | None:
    """Find the checkpoint to resume from, if any, and truncate the log to it."""
    milestones = milestone_steps(config)
    last = last_whole_checkpoint(run.checkpoints)
    step = step_of(last) if last else 0
    rows = [row for row in read_jsonl(run.metrics, METRICS, "`cratescope train`") if row["step"] <= step]
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    for missed in sorted(m for m in milestones if m <= step and not run.milestone(m).manifest.exists()):
        say(f"milestone {missed} is not kept: training is at step {step} already", "yellow")
    logged = rows[-1]["step"] if rows else 0
    if logged < step - step % config.log_every:
        say(f"warning: {run.metrics} ends at step {logged} of {step}: the losses between are lost", "yellow")
    return last


def _crops(config: TrainConfig, data: TokenData) -> Crops:
    length = config.steps * config.batch_tokens // config.context
    return Crops(config.sampling, data.split("train"), config.context, config.seed, length)


def _check(config: TrainConfig, data: TokenData, device: torch.device) -> None:
    """Refuse settings that contradict each other, the data or this machine, before anything is written."""
    if (ids := n_ids(data.tokenizer)) > data.vocab_size:  # prepared when entries were counted instead
        raise UserError(f"{data.path}: its manifest does not count the ids up to {ids - 1}; prepare it again elsewhere")
    a_pass = config.micro_batch * config.context * processes()
    if config.batch_tokens % a_pass:
        raise UserError(
            f"batch_tokens = {config.batch_tokens} is not a multiple of micro_batch x context x processes = "
            f"{config.micro_batch} x {config.context} x {processes()} = {a_pass}; change one of them"
        )
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to {name}: the package is not installed; run `pip install {name}` or leave it out")
    if config.fsdp and (processes() == 1 or device.type == "cpu"):
        raise UserError("fsdp shards over several GPUs; start it with `torchrun --nproc-per-node N -m cratescope ...`")
    _crops(config, data)
    data.split("validation").spaced(1, config.context)


def _arguments(config: TrainConfig, run: Run, device: torch.device, dtype: torch.dtype) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        run_name=run.name,
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.batch_tokens // (config.micro_batch * config.context * processes()),
        optim="adamw_torch_fused",
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate / config.learning_rate},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_betas[0],
        adam_beta2=config.adam_betas[1],
        max_grad_norm=config.clip,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        # Blocks are wrapped one by one: both models name theirs in _no_split_modules.
        fsdp=config.fsdp or None,  # type: ignore[arg-type]  # annotated for its old form, a string
        seed=config.seed,
        # The crops are random already; reading them in order is what makes a resumed run read the same ones, and
        # handing micro-batches to the processes in turn what makes them read those that one process would.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        report_to=list(config.report_to),
        disable_tqdm=True,
        label_names=["labels"],
    )
    # Several GPUs in one process would each read a micro-batch of their own, unseen by the count of tokens.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _publish(config: TrainConfig, data: TokenData, started: float, step: int, model: PreTrainedModel) -> None:
    """Write the files that later stages read: to the run's directory after the last step, else to a milestone's.

    run.json comes last and marks the directory as complete.
    """
    whole = Run(config.out)
    run = whole if step == config.steps else whole.milestone(step)
    with atomic_folder(run.model) as folder:
        model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
        mark_whole(folder)
    if run is not whole:
        write_text(run.metrics, whole.metrics.read_text())
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    write_json(
        run.manifest,
        {
            "name": run.name,
            "arm": config.arm(step).row(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_without_positions": count_parameters(model),
            "n_layer": model.config.n_layer,
            "n_neurons": getattr(model.config, "n_atoms", 4 * model.config.n_embd),
            "vocab_size": data.vocab_size,
            "context": config.context,
            "steps": step,
            "data": run.data_entry(data.path) | {"split_by": data.split_by},
            "settings": settings,
            "versions": versions(),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
