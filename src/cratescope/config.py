"""The settings of every command, as frozen dataclasses. The string under a field is its --help.

Defaults are the paper's wherever the paper gives one (paper sections are named in the strings).
"""

from __future__ import annotations

import functools
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro

from cratescope.hardware import rank, worker_of
from cratescope.run import UserError

Config = TypeVar("Config")
PositionalPath = Annotated[Path, tyro.conf.Positional]
PositionalPaths = Annotated[tuple[Path, ...], tyro.conf.Positional]
Simulator = Literal["list-pmi", "list-in-context", "all-at-once"]
Prompts = Literal["own", "openai"]
DEFAULT_PROTOCOLS = ("top-and-random", "random-only")


LARGEST = 2**31 - 1
LARGEST_SEED = 2**32 - 1
"""What NumPy, PyTorch and transformers all take."""
LARGEST_BATCH = 65_536


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high` without nan and inf; `above` and `below` leave out the ends."""

    low: float
    high: float
    above: bool
    below: bool

    def refusal(self, number: float) -> str | None:
        """What a number that is not among them has to be."""
        if not (number > self.low if self.above else number >= self.low):  # also when it is nan
            return f"more than {self.low}" if self.above else f"{self.low} or more"
        if not (number < self.high if self.below else number <= self.high):
            return f"less than {self.high}" if self.below else f"{self.high} or less"
        return None

    def __call__(self, default: str) -> str:
        """What --help says behind an option."""
        low = f"more than {self.low}" if self.above else f"{self.low} or more"
        high = f", {'less than ' if self.below else 'up to '}{self.high}" if self.high != LARGEST else ""
        return f"({low}{high}; default: {default})"


def within(low: float, high: float = LARGEST, *, above: bool = False, below: bool = False) -> Any:
    """The range of an option of numbers, to stand in its annotation; of a tuple that of each number in it."""
    return tyro.conf.arg(help_behavior_hint=Range(low, high, above, below))


@functools.cache
def ranges(kind: type) -> dict[str, Range]:
    """Range of every option of numbers of a class of settings."""
    hints = get_type_hints(kind, include_extras=True).items()
    found = {name: [getattr(part, "help_behavior_hint", None) for part in get_args(hint)[1:]] for name, hint in hints}
    return {name: part for name, parts in found.items() for part in parts if isinstance(part, Range)}


class _Checked:
    """Refuses what is out of its option's range, and text that no file can hold, when settings are made."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for option in fields(kind):
            value = getattr(self, option.name)
            for one in value if isinstance(value, tuple) else (value,):
                reason = _refusal(one, option.default, ranges(kind).get(option.name))
                if reason:
                    raise UserError(f"{self._flag(option.name)} {one!s:.60}: {reason}")
            if value == () and option.default not in ((), MISSING):
                raise UserError(f"{self._flag(option.name)}: name at least one")
        worker_of(getattr(self, "worker", "auto"))
        rank(local=True)  # what a launcher of processes says is checked here too
        gpus = getattr(self, "ray_gpus", 0)
        if gpus > 1 and gpus % 1:
            raise UserError(f"--ray-gpus {gpus}: Ray shares out parts of one GPU, or whole ones; give a whole number")

    @classmethod
    def _flag(cls, name: str) -> str:
        """What the option is called on the command line."""
        positional = tyro.conf.Positional in get_args(get_type_hints(cls, include_extras=True)[name])
        return name if positional else f"--{name.replace('_', '-')}"


def _refusal(value: Any, default: Any, span: Range | None) -> str | None:
    """Why an option cannot have this value, if so."""
    if span and isinstance(value, int | float):
        reason = span.refusal(value)
        return reason and f"has to be {reason}"
    if isinstance(value, str) and not value and default != "":
        return "is empty; give a value or leave it out"
    if isinstance(value, str | Path) and re.search("[\0\ud800-\udfff]", str(value)):
        return "is not UTF-8 text without NUL; give another name"
    return None


@dataclass(frozen=True)
class PrepareConfig(_Checked):
    """Turn text into tokenised shards with a manifest, split by document into train, validation and heldout."""

    source: Annotated[str, tyro.conf.Positional]
    """`offline` (packaged corpus), a file or folder (.txt .md .jsonl .parquet .gz .zst), or a hub data set that is
    streamed, such as monology/pile-uncopyrighted (the paper's)."""
    out: Path
    """Folder to write; the same command goes on where a killed one was, also in the midst of a stream."""
    tokenizer: str = "gpt2"
    """`gpt2` (packaged GPT-2 BPE), `bpe:N` (N entries, trained on the text), or a tokenizer folder or hub name."""
    max_megabytes: Annotated[float | None, within(0, above=True)] = None
    """Take only about this many megabytes of text, spread evenly over the parts of the source."""
    validation: Annotated[float, within(0, 1, above=True, below=True)] = 0.01
    """Fraction of the documents in the validation split (loss curves)."""
    heldout: Annotated[float, within(0, 1, above=True, below=True)] = 0.05
    """Fraction of the documents in the heldout split (neuron records are collected here)."""
    shard_tokens: Annotated[int, within(1, 10**15)] = 268_435_456
    """Tokens in one shard file; each is an open file while training."""
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Decides which document is in which split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation + self.heldout >= 1:
            raise UserError("--validation and --heldout together leave nothing to train on; make them smaller")


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """Train one language model with the paper's recipe (section 3) and write it as a Hugging Face checkpoint."""

    out: Annotated[Path, tyro.conf.Positional]
    """Run directory to write; the same command resumes from the last whole checkpoint."""
    data: Path
    """Folder made by `cratescope prepare`."""
    budget: Literal["paper", "hour", "minutes"] = "paper"
    """Sets the defaults of the options below: the paper's recipe, or about 25 or 2 million tokens for a CPU."""
    preset: str = "crate-2l"
    """crate-1l, -2l, -3l, -s, -b, or gpt2- likewise; the vocabulary is the data's."""
    steps: Annotated[int, within(0)] = 600_000
    """Optimiser steps in all. 0 writes the untrained model (a control)."""
    batch_tokens: Annotated[int, within(1)] = 491_520
    """Tokens an optimiser step, over all devices (paper: 12 x 1024 x 40)."""
    micro_batch: Annotated[int, within(1, LARGEST_BATCH)] = 12
    """Crops in one forward pass on one device; the rest of batch_tokens is gradient accumulation."""
    context: Annotated[int, within(2)] = 1024
    """Tokens in a crop, and the model's longest context."""
    learning_rate: Annotated[float, within(0, above=True)] = 6e-4
    """Peak learning rate, reached after the warm-up."""
    min_learning_rate: Annotated[float, within(0)] = 6e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: Annotated[int, within(0)] = 2000
    """Linear warm-up steps."""
    weight_decay: Annotated[float, within(0)] = 0.1
    """On tensors with two or more dimensions only."""
    adam_betas: Annotated[tuple[float, float], within(0, 1, below=True)] = (0.9, 0.95)
    """AdamW momentum and second-moment decay."""
    clip: Annotated[float, within(0)] = 1.0
    """Largest gradient norm (0: gradients are not clipped)."""
    validate_every: Annotated[int, within(0)] = 1000
    """Steps between two validations (0: only at the end)."""
    validation_crops: Annotated[int, within(1)] = 64
    """Crops of the validation split read each time, evenly spaced."""
    log_every: Annotated[int, within(1)] = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: Annotated[int, within(1)] = 1000
    """Steps between two checkpoints."""
    keep: Annotated[int, within(2)] = 2
    """Last checkpoints kept; with two, one is left when the newest is damaged."""
    milestones: Annotated[tuple[float, ...], within(0, 1, above=True)] = ()
    """Fractions of the steps, such as 0.1 0.5, at which the model is kept as a run of its own in RUN/milestones."""
    sampling: Literal["random", "packed"] = "random"
    """Crops that start anywhere (paper), or that share no token until every one was read."""
    workers: Annotated[int, within(0, 256)] = 0
    """Processes that read crops ahead of each training process (0: it reads them itself)."""
    fsdp: bool = False
    """Shard weights and optimizer over the processes (FSDP) instead of copying them to each (DDP)."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the log to these; each needs its own package. metrics.jsonl is always written."""
    crate: dict[str, str] = field(default_factory=dict)
    """Overrides of CRATE config fields, such as `--crate ista_steps 3 ista_lambda 0.2`."""
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seeds the weights and the crops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast with float32 weights; auto takes it where the hardware has it."""

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
                raise UserError(f"{value}: is no multiple of --log-every {self.log_every}; change one of them")


# What a smaller budget changes: fewer tokens a step, and the higher learning rate that small models then take.
BUDGETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "hour": {
        "steps": 1500,
        "batch_tokens": 16_384,
        "micro_batch": 16,
        "context": 256,
        "learning_rate": 2e-3,
        "min_learning_rate": 2e-4,
        "warmup_steps": 100,
        "validate_every": 100,
        "save_every": 100,
    },
    "minutes": {
        "steps": 500,
        "batch_tokens": 4096,
        "micro_batch": 16,
        "context": 256,
        "learning_rate": 2e-3,
        "min_learning_rate": 2e-4,
        "warmup_steps": 50,
        "validate_every": 100,
        "save_every": 100,
    },
}


@dataclass(frozen=True)
class EvaluateConfig(_Checked):
    """Loss, perplexity and bits per byte with standard errors on any text, lm-eval tasks, and next-token examples."""

    run: PositionalPath
    """Run directory with a trained model."""
    data: Path | None = None
    """Folder made by `cratescope prepare`; the run's own by default."""
    on: tuple[str, ...] = ()
    """What to read besides the validation split: heldout, a text file or folder (.txt .md .jsonl .parquet .gz .zst),
    a hub set by name (pile, openwebtext, lambada, wikitext, ptb), or a local copy of one (lambada=FILE)."""
    crops: Annotated[int, within(1)] = 256
    """Crops of --context tokens read of a split, evenly spaced over it."""
    context: Annotated[int | None, within(2)] = None
    """Tokens read at once: by default the model's longest context, at most 4096; a model that states none needs it."""
    max_documents: Annotated[int, within(1)] = 6000
    """Documents read of a file or hub set, from its start (all of LAMBADA are 5,153)."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks, such as lambada_openai,wikitext (pip install 'cratescope[eval]')."""
    task_folder: Path | None = None
    """Folder with YAML files of lm-eval tasks of your own, to be named in --tasks."""
    batch_size: Annotated[int, within(1, LARGEST_BATCH)] = 8
    """Crops in one forward pass, or as many tokens of other text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run the model."""

    def task_names(self) -> list[str]:
        """The tasks one by one, separated by spaces or commas."""
        return [name for part in self.tasks for name in part.split(",") if name]


@dataclass(frozen=True)
class CollectConfig(_Checked):
    """Read held-out text once and write, for every neuron, windows, moments, histogram and token means."""

    run: PositionalPath
    """Run directory with a trained model."""
    model: str | None = None
    """A causal language model trained elsewhere, folder or hub name: it is copied into the run directory first."""
    data: Path | None = None
    """Folder made by `cratescope prepare`; the run's own by default."""
    site: str = "auto"
    """`auto` (CRATE: codes, others: mlp), codes, first_codes, mlp, attention, residual, or a module path with {layer}
    such as `transformer.h.{layer}.mlp.act`, `:input` behind it for what the module is given."""
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to read; all by default. The pass stops behind the last of them."""
    excerpts: Annotated[int, within(1)] = 8000
    """Excerpts read, evenly spaced over the heldout split (paper: 8000)."""
    context: Annotated[int | None, within(1)] = None
    """Tokens in an excerpt (paper: 1024); the model's longest context by default. A model that states none needs it."""
    top: Annotated[int, within(1, 100_000)] = 50
    """Windows of the highest activations kept."""
    per_excerpt: Annotated[int, within(1)] = 1
    """At most this many of them from one excerpt."""
    random: Annotated[int, within(0, 100_000)] = 50
    """Windows of uniformly drawn positions kept."""
    window: Annotated[int, within(1)] = 64
    """Tokens in a window: this many halves before the chosen token and the rest from it on (paper: -32..+31)."""
    strata: bool = True
    """Count every activation in a histogram and keep random windows by quantile, by rank and by level."""
    tokens: Annotated[int, within(1)] = 8192
    """Token ids whose mean activation is kept: the most frequent ones of the text."""
    dump: bool = False
    """Also write every non-zero activation with its position."""
    batch_size: Annotated[int, within(1, LARGEST_BATCH)] = 16
    """Excerpts in one forward pass."""
    part: Annotated[int, within(1)] = 512
    """Excerpts in one part; a kill loses at most one part of work."""
    worker: str = "auto"
    """i/n: do every n-th part from the i-th on, i from 0; auto reads torchrun's RANK and WORLD_SIZE."""
    ray: Annotated[int, within(0, 10_000)] = 0
    """Do it in this many Ray tasks, on a cluster or here (pip install 'cratescope[ray]'); each is one worker."""
    ray_gpus: Annotated[float, within(0, 1000)] = 0
    """GPUs of a Ray task; 0.5 lets two share one."""
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Draws the random positions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format to run the model in; auto is that of its checkpoint. float32 where float16 overflows."""


@dataclass(frozen=True)
class LLMConfig(_Checked):
    """The language model that explains or simulates."""

    llm: str = "offline"
    """`offline` (SmolLM2-135M-Instruct from the package registry), a hub name, a model folder, a .gguf file, or the
    address of an OpenAI-compatible server such as http://127.0.0.1:8000/v1."""
    llm_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run it."""
    llm_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 where the hardware has it."""
    llm_quantize: Literal["none", "4bit"] = "none"
    """4bit loads the weights in 4 bits (CUDA, pip install bitsandbytes)."""
    llm_device_map: Literal["one", "auto"] = "one"
    """auto spreads the layers over all GPUs."""
    llm_batch: Annotated[int, within(1, LARGEST_BATCH)] = 16
    """Prompts in one forward pass."""
    llm_max_tokens: Annotated[int | None, within(1)] = None
    """Longest explanation (paper: 60, the default); a model that reasons before it answers wants 2000 or more."""
    llm_model: str = ""
    """Server: which of its models; also the explainer's name in files."""
    llm_tokenizer: str = ""
    """Server: hub name or folder of the model's tokenizer; simulating needs it."""
    llm_chat: bool = False
    """Server: ask through /chat/completions (explanations only)."""
    llm_concurrency: Annotated[int, within(1, 4096)] = 8
    """Server: requests under way at once."""
    llm_per_minute: Annotated[int | None, within(1)] = None
    """Server: at most this many requests a minute."""
    llm_timeout: Annotated[int, within(1, 86_400)] = 120
    """Server: seconds to wait for an answer; then the request is repeated."""
    llm_key_env: str = "OPENAI_API_KEY"
    """Server: environment variable with the key."""

    @property
    def served(self) -> bool:
        """Is it a server's?"""
        return self.llm.lower().startswith(("http://", "https://"))

    @property
    def llm_name(self) -> str:
        """What files call it: a server's address may be another tomorrow."""
        return self.llm_model if self.served else self.llm


@dataclass(frozen=True)
class ExplainConfig(_Checked):
    """Ask an LLM for one phrase a neuron, from its highest-activating records."""

    run: PositionalPath
    """Run directory with neuron records."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to explain; all by default."""
    neurons: Annotated[int | None, within(1)] = None
    """How many neurons a layer, drawn at random by the seed; all by default."""
    neuron_seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Draws the neurons; growing --neurons keeps those already done."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols to explain for (docs/evaluation.md); those that explain from the same windows share explanations."""
    prompts: Prompts = "own"
    """`own`, or `openai`: the exact ones, from an installed automated-interpretability."""
    worker: str = "auto"
    """i/n: do every n-th batch from the i-th on, i from 0; auto reads torchrun's RANK and WORLD_SIZE."""
    ray: Annotated[int, within(0, 10_000)] = 0
    """Do it in this many Ray tasks, on a cluster or here (pip install 'cratescope[ray]'); each is one worker."""
    ray_gpus: Annotated[float, within(0, 1000)] = 0
    """GPUs of a Ray task; 0.5 lets two share one."""
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)


@dataclass(frozen=True)
class SimulateConfig(_Checked):
    """Predict activations from every explanation, and from the controls that a score is compared with."""

    run: PositionalPath
    """Run directory with explanations."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    explainer: str = "offline"
    """Whose explanations: the --llm given to `explain`."""
    simulator: Simulator = "list-pmi"
    """`list-pmi` (one forward an explanation, context-free), `list-in-context` (one forward a window), or
    `all-at-once` (OpenAI's protocol, digits)."""
    neurons: Annotated[int | None, within(1)] = None
    """Only this many of the explained neurons a layer; all by default."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols whose windows are simulated."""
    prompts: Prompts = "own"
    """Wording of all-at-once: `own`, or `openai` from an installed automated-interpretability."""
    reference_quirks: bool = False
    """all-at-once: read values as the reference code does (docs/evaluation.md)."""
    worker: str = "auto"
    """i/n: do every n-th batch from the i-th on, i from 0; auto reads torchrun's RANK and WORLD_SIZE."""
    ray: Annotated[int, within(0, 10_000)] = 0
    """Do it in this many Ray tasks, on a cluster or here (pip install 'cratescope[ray]'); each is one worker."""
    ray_gpus: Annotated[float, within(0, 1000)] = 0
    """GPUs of a Ray task; 0.5 lets two share one."""
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.simulator != "all-at-once" and (self.reference_quirks or self.prompts != "own"):
            raise UserError(
                f"--simulator {self.simulator} is our own; --reference-quirks and --prompts go with all-at-once"
            )
        if self.llm.served and (self.simulator != "all-at-once" or self.reference_quirks):
            raise UserError(
                f"--llm {self.llm.llm}: a server tells of the likeliest tokens only, and the list simulators and "
                "--reference-quirks need the whole vocabulary; use --simulator all-at-once, or run the model here "
                "(--llm HUB_NAME or FOLDER)"
            )
        if self.llm.served and not self.llm.llm_tokenizer:
            raise UserError(
                f"--llm {self.llm.llm}: simulating needs the tokenizer of the server's model; name it with "
                "--llm-tokenizer (hub name or folder)"
            )


@dataclass(frozen=True)
class JudgeConfig(_Checked):
    """Ask an LLM about whole windows instead of simulating: detection, fuzzing or intruder detection."""

    run: PositionalPath
    """Run directory with explanations."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    explainer: str = "offline"
    """Whose explanations: the --llm given to `explain`."""
    scorer: Literal["detection", "fuzzing", "intruder"] = "detection"
    """Does the window hold it; are the marked tokens it; which of five windows is foreign."""
    neurons: Annotated[int | None, within(1)] = None
    """Only this many of the explained neurons a layer; all by default."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols whose explanations are judged; those that explain from the same windows are one."""
    worker: str = "auto"
    """i/n: do every n-th batch from the i-th on, i from 0; auto reads torchrun's RANK and WORLD_SIZE."""
    ray: Annotated[int, within(0, 10_000)] = 0
    """Do it in this many Ray tasks, on a cluster or here (pip install 'cratescope[ray]'); each is one worker."""
    ray_gpus: Annotated[float, within(0, 1000)] = 0
    """GPUs of a Ray task; 0.5 lets two share one."""
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)


@dataclass(frozen=True)
class ScoreConfig(_Checked):
    """Compare simulated with true activations, beside every control, and say which measures may be trusted."""

    run: PositionalPath
    """Run directory with simulations."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    explainer: str = "offline"
    """Whose explanations: the --llm given to `explain`."""
    simulator: Simulator = "list-pmi"
    """Whose simulations: as given to `simulate`."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Which protocols to score; judgements (detection, fuzzing, intruder) are scored where there are any."""


@dataclass(frozen=True)
class ExportConfig(_Checked):
    """Write neuron records in another tool's format: OpenAI's NeuronRecord JSON, or delphi's cache of activations."""

    run: PositionalPath
    """Run directory with neuron records."""
    out: Path
    """Folder to write."""
    format: Literal["openai", "delphi"] = "openai"
    """`openai`: one {layer}/{neuron}.json a neuron; `delphi`: all non-zero activations (needs `collect --dump`)."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to write; all by default."""
    data: Path | None = None
    """delphi: the folder of tokens given to `collect`; the run's own by default."""


@dataclass(frozen=True)
class ImportConfig(_Checked):
    """Read OpenAI NeuronRecord JSON made elsewhere into a run directory, to explain, simulate and score it here."""

    source: PositionalPath
    """Folder with one {layer}/{neuron}.json a neuron."""
    out: Path
    """Run directory to write; it has records and a tokenizer, and no model."""


@dataclass(frozen=True)
class ShowConfig(_Checked):
    """Print a card of one neuron: explanation, scores, moments, histogram, tokens and windows shaded by activation."""

    run: PositionalPath
    """Run directory with neuron records."""
    layer: Annotated[int, tyro.conf.Positional, within(0)]
    """Its layer, from 0."""
    neuron: Annotated[int, tyro.conf.Positional, within(0)]
    """Its index in the layer, from 0."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    explainer: str = "offline"
    """Whose explanation: the --llm given to `explain`."""
    simulator: Simulator = "list-pmi"
    """Whose simulations the scores are of."""


@dataclass(frozen=True)
class ReportConfig(_Checked):
    """Write one self-contained HTML report of some runs, its numbers as CSV and JSON, its figures as SVG and PNG."""

    runs: PositionalPaths
    """Run directories."""
    out: Path
    """Folder to write."""
    explainer: str = "offline"
    """Whose explanations."""
    simulator: Simulator = "list-pmi"
    """Whose simulations."""
    primary: str = "uniform/pearson/shuffled"
    """The measure that decides, named before the runs: protocol/measure, and /control for the gain over a control
    (shuffled, empty, unigram, untrained); docs/evaluation.md says why this one. All others are secondary."""
    title: str = "cratescope report"
    """Title of the page."""
    cards: Annotated[int, within(0, 10_000)] = 8
    """Neuron cards a layer, spread evenly over the ranking by score."""


@dataclass(frozen=True)
class ConvertConfig(_Checked):
    """Turn the authors' nanoGPT-style checkpoint (.pt) into a Hugging Face folder, or such a folder back into a .pt."""

    source: PositionalPath
    """A .pt checkpoint, or a folder with config.json and model.safetensors."""
    out: PositionalPath
    """The folder, or the .pt file, to write."""


@dataclass(frozen=True)
class StudyConfig(_Checked):
    """Prepare, train, collect, explain, simulate, score and report a matrix of models described in one TOML file."""

    config: PositionalPath
    """TOML file; `studies/demo.toml` shows every section."""
    out: Path
    """Folder to write; finished work is skipped, so the same command resumes."""


MAY_BE_EMPTY = ("--llm-model", "--llm-tokenizer")
"""An empty path would be the folder that one is in, and nearly always is a variable that was not set."""


def _refuse_empty(arguments: list[str]) -> None:
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name = before if before.startswith("--") else "an argument"
        if re.fullmatch("--[a-z_-]+=", argument):
            name, argument = argument[:-1], ""
        if not argument and name not in MAY_BE_EMPTY:
            raise UserError(f"{name}: is empty; give a value or leave it out")


def parse(kind: type[Config], arguments: list[str], prog: str | None = None) -> Config:
    """Settings of `kind` from command-line arguments; `--budget` of training chooses the defaults of the others.

    Ends the process as a command line does: exit code 0 after --help, 2 for what cannot be parsed.
    """
    default: Any = tyro.MISSING_NONPROP
    _refuse_empty(arguments)
    words = [word for argument in arguments for word in argument.split("=", 1 if argument[:9] == "--budget=" else 0)]
    if kind is TrainConfig and "--budget" in words[:-1]:
        budget = words[len(words) - words[::-1].index("--budget")]
        if budget in BUDGETS:
            default = TrainConfig(tyro.MISSING, tyro.MISSING, budget, **BUDGETS[budget])  # type: ignore[arg-type]
    return tyro.cli(kind, prog=prog, args=arguments, default=default)
