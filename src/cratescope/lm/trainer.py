"""transformers' Trainer with exact losses, speed, validation, signal handling and verified checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather, reduce, wait_for_everyone
from jaxtyping import Int
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState

from cratescope.errors import UserError
from cratescope.files import mark_whole
from cratescope.hardware import gemm_peak
from cratescope.lm.checkpoints import rotate
from cratescope.lm.config import TrainConfig
from cratescope.lm.evaluate import crop_losses, mean_loss
from cratescope.lm.head import Head
from cratescope.models.cost import flops_per_token
from cratescope.models.folder import load_folder
from cratescope.progress import step_bar
from cratescope.run import Run
from cratescope.stopping import Asked
from cratescope.workers import processes, rank

PENALTY_GROWS = 0.2
"""Share of the steps over which the weight of the penalty on activations grows from 0 to its value."""


class Watch(TrainerCallback):
    """Callback on every step: stops on a signal or a NaN loss, writes metrics.jsonl, marks checkpoints complete.

    Args:
        weight: what that of the penalty on activations grows to.
        publish: called with the step and model of a milestone, by process 0, before its checkpoint is marked.
    """

    def __init__(
        self, config: TrainConfig, run: Run, weight: float, publish: Callable[[int, PreTrainedModel], None]
    ) -> None:
        self.config, self.run, self.weight, self.publish = config, run, weight, publish
        self.milestones = milestone_steps(config)
        self.last: Path | None = None
        self.signal, self.step = 0, 0
        self.asked = Asked()
        self.step_loss: torch.Tensor | float = 0.0
        self.seconds, self.timed_steps = 0.0, 0
        self.name = f"train {run.name}"
        self.progress = step_bar(
            "loss {task.fields[loss]} {task.fields[speed]}",
            shown=rank() == 0,
            speed_estimate_period=3600,  # one step of the paper's recipe takes minutes on a small machine
        )

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Show progress, and let the first SIGTERM or SIGINT request a clean stop instead of killing the process."""
        with self.asked, self.progress:
            yield

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        peak = gemm_peak(args.device, torch.bfloat16 if args.bf16 else torch.float32)
        # Every process measures at the same time, so cores and memory are shared as they will be in training.
        self.peak = float(reduce(torch.tensor(peak, device=args.device), "sum"))
        self.flops = flops_per_token(model.config, self.config.context)
        begun: dict[str, Any] = {"total": state.max_steps, "completed": state.global_step}
        self.task = self.progress.add_task(self.name, **begun, loss="-", speed="")
        self.clock = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def penalty(self, activations: torch.Tensor) -> torch.Tensor:
        """Weigh the sum of activations at this step: the weight grows, for neurons punished before they are of use die.

        What is added to the loss is taken from the loss that is shown, so that models with and without can be compared.
        """
        added = self.weight * min(1.0, self.step / (PENALTY_GROWS * self.config.steps)) * activations
        self.step_loss = self.step_loss - processes() * added.detach()  # the Trainer's loss is times the processes
        return added

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Share losses and signals among all processes, so that either all stop after the same step or none does."""
        asked = [self.asked.signal == signal.SIGTERM, self.asked.signal == signal.SIGINT]
        told = torch.tensor([float(self.step_loss), *asked], dtype=torch.float64, device=args.device)
        loss, terminate, interrupt = reduce(told, "sum").tolist()
        loss /= args.world_size
        self.step_loss = 0.0
        self.signal = signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(self._not_a_number(state.global_step, loss))
        # The state is in every checkpoint, so a run resumed between two lines of the log writes the same mean.
        state.log_history.append({"step_loss": loss})
        self.progress.update(self.task, loss=f"{loss:.3f}")

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Move the thresholds of sparse codes, by counts of the whole step: the same in every process."""
        if hasattr(model, "regulate"):
            pace = optimizer.param_groups[0]["lr"] / self.config.learning_rate
            model.regulate(lambda counts: reduce(counts, "sum"), pace)

    def _not_a_number(self, step: int, loss: float) -> str:
        crops = self.config.batch_tokens // self.config.context
        what = f"the loss is {loss}," if not math.isfinite(loss) else f"the loss is {loss:.3f} but its gradient is"
        return (
            f"{self.run.root}: step {step + 1} (crops {step * crops} to {(step + 1) * crops - 1}): {what} not a finite "
            f"number; the last good checkpoint is {self.last or 'none yet'}; train in another run directory with a "
            f"lower learning rate than {self.config.learning_rate:g}"
        )

    def on_step_end(self, args, state, control, **kwargs):
        step, every = state.global_step, self.config.validate_every
        self.seconds, self.timed_steps = self.seconds + time.monotonic() - self.clock, self.timed_steps + 1
        self.clock = time.monotonic()
        self.progress.update(self.task, completed=step)
        control.should_evaluate = bool(every and step % every == 0) or step == state.max_steps
        if step in self.milestones or self.signal:
            control.should_save = True
        if self.signal:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not (logs.keys() & {"loss", "validation_loss"}):
            return
        state.log_history.clear()  # metrics.jsonl has it
        if "loss" in logs:
            speed, share = logs["tokens_per_second"], logs["utilisation"]
            self.progress.update(self.task, speed=f"{speed:,.0f} tokens/s, {share:.0%} of peak")
        if state.is_world_process_zero:
            row: dict[str, Any] = {"step": state.global_step, "tokens": state.global_step * self.config.batch_tokens}
            row |= {name: value for name, value in logs.items() if name != "epoch"}
            row |= {name: None for name, value in row.items() if not math.isfinite(value)}
            with open(self.run.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.clock = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        checkpoint = self.run.checkpoints / f"checkpoint-{state.global_step}"
        wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            if state.global_step in self.milestones:
                self.publish(state.global_step, load_folder(checkpoint))
            mark_whole(checkpoint)
            rotate(self.run.checkpoints, self.config.keep)
        self.last = checkpoint
        self.clock = time.monotonic()

    def means(self, state: TrainerState) -> dict[str, float]:
        """Loss (nats), tokens per second and FLOP utilisation since the previous line of the log."""
        losses = [row["step_loss"] for row in state.log_history if "step_loss" in row]
        speed = self.timed_steps * self.config.batch_tokens / self.seconds
        self.seconds, self.timed_steps = 0.0, 0
        return {
            "loss": math.fsum(losses) / len(losses),
            "tokens_per_second": round(speed, 1),
            "utilisation": round(speed * self.flops / self.peak, 4),
        }


class WatchedTrainer(Trainer):
    """The library's training loop with our loss in its log, and our validation."""

    def __init__(self, watch: Watch, validation: Int[np.ndarray, "n t"], **kwargs: Any) -> None:
        super().__init__(**kwargs, callbacks=[watch])
        self.remove_callback(PrinterCallback)
        self.watch, self.validation = watch, validation

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices; the library's own choice goes by names and would take in the shares of a lag."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.watch.step_loss = self.watch.step_loss + loss
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs = {name: value for name, value in logs.items() if name != "train_loss"}  # which has the penalty in it
        super().log(logs | self.watch.means(self.state) if "loss" in logs else logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss; each process reads an equal share of the crops, some of them twice if they do not divide."""
        model: Any = self.model
        if hasattr(model, "unshard"):
            model.unshard()  # FSDP: the losses are read from parts of the model
        share = -(-len(self.validation) // processes())
        mine = self.validation.take(range(rank() * share, (rank() + 1) * share), axis=0, mode="wrap")
        head = Head(model, "product")  # as `fuse` takes it; a trial would call the sharded model as a whole
        losses = torch.from_numpy(crop_losses(model, mine, self.args.per_device_train_batch_size, head=head).mean(1))
        everyone = gather(losses.to(self.args.device)).cpu().numpy()[: len(self.validation)]
        loss, error = mean_loss(everyone)
        found = {"validation_loss": loss, "validation_standard_error": error or math.nan}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


def milestone_steps(config: TrainConfig) -> set[int]:
    """The steps after which the model is kept; the last is the run itself, and no steps have none before it."""
    steps = {max(1, round(fraction * config.steps)) for fraction in config.milestones}
    return {step for step in steps if step < config.steps}
