"""Train sparse autoencoders from a stream of activations: several layers and settings in one pass over the text."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import Stopped, UserError
from cratescope.files import read_jsonl, sha256, write_text
from cratescope.hardware import pick_device, pick_dtype
from cratescope.lm.load import data_of, load_model
from cratescope.locks import locked
from cratescope.models.folder import context_length
from cratescope.models.sae import CoderConfig, Kind, Origin, SparseCoder, coder_folder, save_coder
from cratescope.neurons.sites import Site, site_named
from cratescope.neurons.tensors import load_tensors, save_tensors
from cratescope.progress import say, step_bar
from cratescope.run import Run, claim
from cratescope.sae.config import Recipe, SaeConfig
from cratescope.sae.foreign import bring_in
from cratescope.sae.learner import Learner, Plan
from cratescope.sae.step import Step
from cratescope.sae.stream import Stream, width_of
from cratescope.stopping import Asked
from cratescope.text.crops import Crops
from cratescope.text.shards import TokenData

PENALTIES = {"relu": 2.0, "jumprelu": 1.0}
"""Weights of the penalty unless given (docs/dictionaries.md says what they lead to)."""
LEARNT: dict[str, Kind] = {kind: kind for kind in get_args(Kind)} | {"frozen": "batchtopk"}
"""What a coder learns as; identity and rotation learn nothing."""
NOT_IDENTITY = ("run", "name", "source", "grid", "layers", "data", "device", "dtype", "log_every", "save_every")
"""Settings that may change between a run and its resumption, or are in the identity in another form."""
VERSION = 1
"""Of how coders learn: raise it when the same settings lead to another coder."""
KEEP = 2
"""Checkpoints kept; with two, one is left if the newest is damaged."""


@dataclass(frozen=True)
class Setting:
    """What one member of a grid is: all that can differ between coders that learn together."""

    name: str
    kind: Recipe
    expansion: int
    k: int
    penalty: float | None

    @property
    def learns(self) -> bool:
        return self.kind in LEARNT

    def config(self, of: SaeConfig, d_in: int) -> CoderConfig:
        """Configuration of a coder of activations of this width. UserError: k is above the number of features."""
        width = self.expansion * d_in
        if self.k > width and self.kind not in PENALTIES:
            raise UserError(f"k = {self.k} is more than the {width} features of {self.name}; lower --k")
        penalty = PENALTIES.get(self.kind, 0.0) if self.penalty is None else self.penalty
        prefixes = {max(1, round(share * width)) for share in of.prefixes} if self.kind == "matryoshka" else set()
        more: dict[str, Any] = {"prefixes": tuple(sorted(prefixes)), "aux": of.aux, "frozen": self.kind == "frozen"}
        return CoderConfig(LEARNT[self.kind], d_in, width, self.k, penalty, **more)

    def fixed(self, mean: Float[Tensor, " d"], origin: Origin, seed: int) -> SparseCoder:
        """The coder of a kind that learns nothing, from the mean of the activations."""
        d = len(mean)
        if self.kind == "identity":
            return SparseCoder.of_axes(torch.eye(d), torch.zeros(d), origin)
        chance = torch.Generator().manual_seed(seed)
        axes, _ = torch.linalg.qr(torch.randn(d, d, generator=chance))
        return SparseCoder.of_axes(axes.T, mean.cpu(), origin)


def settings_of(config: SaeConfig) -> list[Setting]:
    """The setting itself, or all combinations of a grid.

    Raises:
        UserError: an entry of the grid is not `option=value,value`, or a value is none of the option's.
    """
    own = {"kind": config.kind, "expansion": config.expansion, "k": config.k, "penalty": config.penalty}
    axes = dict(_axis(entry) for entry in config.grid)
    found = []
    for values in itertools.product(*axes.values()):
        chosen: dict[str, Any] = dict(zip(axes, values, strict=True))
        tail = "".join(f"-{value if name == 'kind' else f'{name}{value}'}" for name, value in chosen.items())
        found.append(Setting(config.name + tail, **own | chosen))
    return found


def _axis(entry: str) -> tuple[str, list[Any]]:
    name, _, values = entry.partition("=")
    wanted: dict[str, Any] = {"kind": str, "expansion": int, "k": int, "penalty": float}
    if name not in wanted or not values:
        raise UserError(f"--grid {entry:.50}: give {', '.join(wanted)} as in `k=16,32`")
    try:
        found = [wanted[name](value) for value in values.split(",")]
    except ValueError as error:
        raise UserError(f"--grid {entry:.50}: {name} takes numbers, as in `{name}=16,32`") from error
    if name == "kind" and (odd := [value for value in found if value not in get_args(Recipe)]):
        raise UserError(f"--grid {entry:.50}: no kind {odd[0]!r}; there are {', '.join(get_args(Recipe))}")
    if name != "kind" and min(found) < (0 if name == "penalty" else 1):
        raise UserError(f"--grid {entry:.50}: {name} has to be {0 if name == 'penalty' else 1} or more")
    return name, list(dict.fromkeys(found))


def train_coders(config: SaeConfig) -> list[Path]:
    """Train sparse autoencoders, or bring in others' (`--from`); return a folder per setting. Finished work is skipped.

    Raises:
        UserError: no model or data, no such site or layer, layers of several widths, k above the width, too little
            text, an activation that is not a number, or autoencoders of that name with other settings.
        Stopped: on SIGTERM or SIGINT, after finishing the current step and writing a checkpoint.
    """
    if config.source is not None:
        return [bring_in(config)]
    job = Job.of(config)
    folders = [job.run.saes(setting.name) for setting in job.settings]
    with locked(job.folder, "sae"):
        for setting, folder in zip(job.settings, folders, strict=True):
            claim(folder, job.identity(setting))
        claim(job.folder, job.identity(None if config.grid else job.settings[0]))
        made = (coder_folder(job.run, setting.name, layer) for setting in job.settings for layer in job.layers)
        if not all(folder.exists() for folder in made):
            job.train()
    return folders


@dataclass(frozen=True)
class Job:
    """All coders that learn from one pass over the text."""

    config: SaeConfig
    run: Run
    data: TokenData
    model: PreTrainedModel
    site: Site
    layers: list[int]
    crops: Crops
    d_in: int
    settings: list[Setting]

    @classmethod
    def of(cls, config: SaeConfig) -> Job:
        """Look at everything that can be refused before anything is written. Errors as of `train_coders`."""
        run, settings = Run(config.run), settings_of(config)
        data = data_of(run, config.data)
        model = load_model(run, config.device)
        site = site_named(config.site, model)
        layers = sorted(set(config.layers or site.layers(model) or [0]))
        for layer in layers:
            site.module(model, layer)
        context = context_length(model.config, config.context or run.read_manifest()["context"])
        crops = Crops("packed", data.split("train"), context, config.seed, 0)
        d_in = width_of(model, site, layers, crops.split.window(0, context))
        for setting in settings:
            if setting.learns:
                setting.config(config, d_in)
        return cls(config, run, data, model, site, layers, crops, d_in, settings)

    @property
    def folder(self) -> Path:
        return self.run.saes(self.config.name)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def steps(self) -> int:
        """Batches to learn from: none where all are controls that learn nothing."""
        return max(1, self.config.tokens // self.config.batch) if any(one.learns for one in self.settings) else 0

    def identity(self, setting: Setting | None) -> dict[str, Any]:
        """What the coders of a setting are made from; with None all of a grid's."""
        config = self.config
        found = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IDENTITY}
        found |= dataclasses.asdict(setting) if setting else {"grid": list(config.grid)}
        found |= {"version": VERSION, "site": self.site.pattern, "context": self.crops.context}
        found["model_sha256"] = self.run.fingerprint()
        dtype = pick_dtype(config.dtype, pick_device(config.device))
        found |= {"data_sha256": sha256(self.data.path / "manifest.json"), "dtype": str(dtype).removeprefix("torch.")}
        return found | {"layers": self.layers}

    def stream(self) -> Stream:
        block = -(-self.config.buffer // self.crops.context)
        return Stream(self.model, self.site, self.layers, self.crops, block, self.config.batch_size, self.config.batch)

    def learners(self) -> dict[tuple[str, int], Learner]:
        """A learner per setting and layer, none of which has learnt yet."""
        device, config = self.model.device, self.config
        plan = Plan(
            self.steps,
            config.learning_rate,
            dead_after=max(1, config.dead_tokens // config.batch),
            seed=config.seed,
            dtype=pick_dtype(config.dtype, device),
        )
        found = {}
        for setting, layer in itertools.product(self.settings, self.layers):
            if not setting.learns:
                continue
            coder = SparseCoder(setting.config(config, self.d_in), self.origin(layer), seed=self.seed(layer))
            found[setting.name, layer] = Learner(coder.to(device), plan)
        return found

    def seed(self, layer: int) -> int:
        """Seed of a layer's random weights."""
        return self.config.seed * 1000 + layer

    def origin(self, layer: int) -> Origin:
        text = self.data.path.name
        sha = self.run.fingerprint()
        return Origin(self.run.name, sha, self.site.name, self.site.pattern, layer, self.crops.context, text)

    def train(self) -> None:
        """Learn from where the newest good checkpoint is, and write all coders."""
        coders = f"{len(self.settings)} x {len(self.layers)} autoencoders of width {self.d_in}"
        say(f"{self.run.name} {self.site.name}: {coders}, {self.steps} steps")
        training = Training(self, self.stream(), self.learners())
        training.resume()
        with Asked() as asked, training.bar():
            for batch in training.left():
                training.learn(batch)
                if asked.signal:
                    break
        if training.step < self.steps:
            training.save()
            number = signal.Signals(asked.signal)
            what = f"{self.folder}: stopped by {number.name} after step {training.step}, which is saved"
            raise Stopped(f"{what}; the same command resumes from there", number)
        training.finish()


class Units:
    """Mean and scale of a layer's activations, which learn as (x - mean) * scale, of mean squared norm d."""

    def __init__(self, mean: Float[Tensor, " d"], scale: float) -> None:
        self.mean, self.scale = mean, scale

    @classmethod
    def of(cls, x: Float[Tensor, "n d"]) -> Units:
        mean = x.mean(0)
        spread = float(x.sub(mean).square_().sum(dtype=torch.float64)) / len(x)
        if not spread > 0:
            raise UserError("its activations are the same for all tokens; name another site or layer")
        return cls(mean, (x.shape[1] / spread) ** 0.5)

    def __call__(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return (x - self.mean).mul_(self.scale)


TALLIED = ("loss", "l0", "error", "variance", "steps")


class Training:
    """The state of a job: what a checkpoint holds, and what a step changes."""

    def __init__(self, job: Job, stream: Stream, learners: dict[tuple[str, int], Learner]) -> None:
        self.job, self.stream, self.learners, self.step = job, stream, learners, 0
        self.units: dict[int, Units] = {}
        self.tallies = {key: torch.zeros(len(TALLIED), dtype=torch.float64) for key in learners}
        self.progress = step_bar("{task.fields[said]}")
        self.clock, self.since = time.monotonic(), 0

    def resume(self) -> None:
        """Take up the newest checkpoint that is whole; without one, learn the units of the activations."""
        for path in sorted(self.job.checkpoints.glob("step-*.safetensors"), reverse=True):
            if state := load_tensors(path):
                self._restore(state)
                break
            say(f"{path} was damaged; using the checkpoint before it", "yellow")
        else:
            for layer, activations in self.stream.read(0).items():
                try:
                    self.units[layer] = Units.of(activations)
                except UserError as error:
                    raise UserError(f"site {self.job.site.name}, layer {layer}: {error}") from error
        rows = read_jsonl(self.job.metrics, {"step": int}, "`cratescope sae`")
        rows = [row for row in rows if row["step"] <= self.step]
        write_text(self.job.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        self.since = self.step

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])
        for layer in self.job.layers:
            mean = state[f"units.{layer}.mean"].to(self.job.model.device)
            self.units[layer] = Units(mean, float(state[f"units.{layer}.scale"]))
        for (name, layer), learner in self.learners.items():
            stem = f"{name}.{layer}."
            own = {key.removeprefix(stem): tensor for key, tensor in state.items() if key.startswith(stem)}
            self.tallies[name, layer] = own.pop("tally")
            learner.restore(own)

    def save(self) -> None:
        """Write a checkpoint, and remove those before the last two."""
        state = {"step": torch.tensor(self.step)}
        for layer, units in self.units.items():
            state[f"units.{layer}.mean"] = units.mean.cpu()
            state[f"units.{layer}.scale"] = torch.tensor(units.scale, dtype=torch.float64)
        for (name, layer), learner in self.learners.items():
            own = learner.state() | {"tally": self.tallies[name, layer]}
            state |= {f"{name}.{layer}.{key}": tensor for key, tensor in own.items()}
        save_tensors(self.job.checkpoints / f"step-{self.step:07d}.safetensors", state)
        for old in sorted(self.job.checkpoints.glob("step-*.safetensors"))[:-KEEP]:
            old.unlink()

    def left(self) -> Iterator[dict[int, Tensor]]:
        """Batches of the steps that are left."""
        return itertools.islice(self.stream.batches(self.step), self.job.steps - self.step)

    @contextlib.contextmanager
    def bar(self) -> Iterator[None]:
        name = f"sae {self.job.run.name} {self.job.site.name}"
        self.task = self.progress.add_task(name, total=self.job.steps, completed=self.step, said="")
        self.clock = time.monotonic()
        with self.progress:
            yield

    def learn(self, batch: Mapping[int, Float[Tensor, "b d"]]) -> None:
        """Let every coder learn from a batch; log and save when it is time."""
        scaled = {layer: self.units[layer](x) for layer, x in batch.items()}
        for (name, layer), learner in self.learners.items():
            found = learner.step(scaled[layer])
            self._refuse_not_a_number(name, layer, found)
            self.tallies[name, layer] += _tally(scaled[layer], found)
        self.step += 1
        config = self.job.config
        if self.step % config.log_every == 0 or self.step == self.job.steps:
            self._log()
        if self.step % config.save_every == 0 and self.step < self.job.steps:
            self.save()
        self.progress.update(self.task, completed=self.step)

    def _refuse_not_a_number(self, name: str, layer: int, found: Step) -> None:
        if found.loss != found.loss or found.loss == float("inf"):
            fix = f"give another --name and a lower --learning-rate than {self.job.config.learning_rate:g}"
            raise UserError(f"{name}, layer {layer}: the loss is {found.loss} at step {self.step + 1}; {fix}")

    def _log(self) -> None:
        seconds = time.monotonic() - self.clock
        speed = (self.step - self.since) * self.job.config.batch / seconds
        rows: list[dict[str, Any]] = []
        for (name, layer), tally in self.tallies.items():
            loss, l0, error, variance, steps = tally.tolist()
            dead = self.learners[name, layer].dead_share
            row = {"step": self.step, "tokens": self.step * self.job.config.batch, "coder": name, "layer": layer}
            row |= {"loss": loss / steps, "l0": l0 / steps, "explained_variance": 1 - error / variance, "dead": dead}
            rows.append(row | {"tokens_per_second": round(speed, 1)})
            tally.zero_()
        with open(self.job.metrics, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self.clock, self.since = time.monotonic(), self.step
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("loss", "l0", "explained_variance", "dead")}
        said = f"loss {mean['loss']:.1f} L0 {mean['l0']:.1f} explained {mean['explained_variance']:.3f}"
        self.progress.update(self.task, said=f"{said} dead {mean['dead']:.1%} {speed:,.0f} tokens/s")

    def finish(self) -> None:
        """Write all coders as coders of the activations themselves, and remove the checkpoints."""
        for (name, layer), learner in self.learners.items():
            units, coder = self.units[layer], learner.coder
            coder.fold(units.mean, units.scale)
            save_coder(coder_folder(self.job.run, name, layer), coder)
        for setting, layer in itertools.product(self.job.settings, self.job.layers):
            if not setting.learns:
                coder = setting.fixed(self.units[layer].mean, self.job.origin(layer), self.job.seed(layer))
                save_coder(coder_folder(self.job.run, setting.name, layer), coder)
        for path in self.job.checkpoints.glob("step-*.safetensors"):
            path.unlink()
        if self.job.checkpoints.exists():
            self.job.checkpoints.rmdir()


def _tally(x: Float[Tensor, "b d"], found: Step) -> Float[Tensor, " n"]:
    """Of one batch: loss, active features per token, squared error, squared distance from the mean, and 1 step."""
    variance = float((x - x.mean(0)).square().sum(dtype=torch.float64))
    error = float(found.error.square().sum(dtype=torch.float64))
    return torch.tensor([found.loss, found.l0, error, variance, 1.0], dtype=torch.float64)
