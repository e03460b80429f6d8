"""The settings of every command, as frozen dataclasses. The string below a field is its --help text.

Defaults are the paper's wherever the paper gives one (paper sections are named in the strings).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cratescope.options import LARGEST_BATCH, LARGEST_SEED, Checked, within
from cratescope.run import UserError

PositionalPath = Annotated[Path, tyro.conf.Positional]
PositionalPaths = Annotated[tuple[Path, ...], tyro.conf.Positional]
Simulator = Literal["list-pmi", "list-in-context", "all-at-once"]
Prompts = Literal["own", "openai"]
Scorer = Literal["detection", "fuzzing", "intruder"]
DEFAULT_PROTOCOLS = ("top-and-random", "random-only")
WORKER = "i/n: do every n-th batch or part from the i-th on, i from 0; auto reads torchrun's RANK and WORLD_SIZE."
RAY = "Do it in this many Ray tasks, on a cluster or here (pip install 'cratescope[ray]'); each is one worker."
# Options of every stage whose work is shared out. A base class would put them first in --help.
Worker = Annotated[str, tyro.conf.arg(help=WORKER)]
RayTasks = Annotated[int, within(0, 10_000, help=RAY)]
RayGPUs = Annotated[float, within(0, 1000, help="GPUs of a Ray task; 0.5 lets two share one.")]


@dataclass(frozen=True)
class PrepareConfig(Checked):
    """Turn text into tokenised shards with a manifest, split by document into train, validation and heldout."""

    source: Annotated[str, tyro.conf.Positional]
    """`offline` (packaged corpus), a file or folder (.txt .md .jsonl .parquet .gz .zst), or a hub data set that is
    streamed, such as monology/pile-uncopyrighted (the paper's)."""
    out: Path
    """Folder to write; the same command resumes after a kill, even in the middle of a stream."""
    tokenizer: str = "gpt2"
    """`gpt2` (packaged GPT-2 BPE), `bpe:N` (N entries, trained on the text), or a tokenizer folder or hub name."""
    max_megabytes: Annotated[float | None, within(0, above=True)] = None
    """Use only about this many megabytes of text, spread evenly over the parts of the source."""
    validation: Annotated[float, within(0, 1, above=True, below=True)] = 0.01
    """Fraction of the documents in the validation split (loss curves)."""
    heldout: Annotated[float, within(0, 1, above=True, below=True)] = 0.05
    """Fraction of the documents in the heldout split (neuron records are collected here)."""
    shard_tokens: Annotated[int, within(1, 10**15)] = 268_435_456
    """Tokens per shard file; each shard is one open file while training."""
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Decides which split each document belongs to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation + self.heldout >= 1:
            raise UserError("--validation and --heldout together leave nothing to train on; make them smaller")


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
    """crate-1l, -2l, -3l, -s, -b, or the same with gpt2-; the vocabulary size comes from the data."""
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
    crate: dict[str, str] = field(default_factory=dict)
    """Overrides of CRATE config fields, such as `--crate ista_steps 3 ista_lambda 0.2`."""
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seed of the initial weights and of the crops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
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
    """Where to run the model."""

    def task_names(self) -> list[str]:
        """List the tasks, which may be separated by spaces or commas."""
        return [name for part in self.tasks for name in part.split(",") if name]


@dataclass(frozen=True)
class CollectConfig(Checked):
    """Read held-out text once and write, for every neuron, windows, moments, histogram and token means."""

    run: PositionalPath
    """Run directory with a trained model."""
    model: str | None = None
    """A causal language model trained elsewhere (folder or hub name); it is copied into the run directory first."""
    data: Path | None = None
    """Folder made by `cratescope prepare`; the run's own by default."""
    site: str = "auto"
    """`auto` (CRATE: codes, others: mlp), codes, first_codes, mlp, attention, residual, or a module path with {layer}
    such as `transformer.h.{layer}.mlp.act`; append `:input` to read the module's input instead of its output."""
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to read; all by default. The forward pass stops after the last of them."""
    excerpts: Annotated[int, within(1)] = 8000
    """Number of excerpts, evenly spaced over the heldout split (paper: 8000)."""
    context: Annotated[int | None, within(1)] = None
    """Tokens per excerpt (paper: 1024); the model's longest context by default, required if the model states none."""
    top: Annotated[int, within(1, 100_000)] = 50
    """Windows kept around the highest activations."""
    per_excerpt: Annotated[int, within(1)] = 1
    """Largest number of top windows from any one excerpt."""
    random: Annotated[int, within(0, 100_000)] = 50
    """Windows kept around uniformly drawn positions."""
    window: Annotated[int, within(1)] = 64
    """Tokens per window, half of them before the peak (paper: -32..+31)."""
    strata: bool = True
    """Count every activation in a histogram, and keep random windows by quantile, by rank and by level."""
    tokens: Annotated[int, within(1)] = 8192
    """Number of token ids, the most frequent in the text, whose mean activation is kept."""
    dump: bool = False
    """Also write every non-zero activation with its position."""
    batch_size: Annotated[int, within(1, LARGEST_BATCH)] = 16
    """Excerpts per forward pass."""
    part: Annotated[int, within(1)] = 512
    """Excerpts in one part; a kill loses at most one part of work."""
    worker: Worker = "auto"
    ray: RayTasks = 0
    ray_gpus: RayGPUs = 0
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seed of the random positions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format to run the model in; auto keeps that of its checkpoint. Use float32 if float16 overflows."""


@dataclass(frozen=True)
class LLMConfig(Checked):
    """The language model that explains or simulates."""

    llm: str = "offline"
    """`offline` (SmolLM2-135M-Instruct from the package registry), a hub name, a model folder, a .gguf file, or the
    address of an OpenAI-compatible server such as http://127.0.0.1:8000/v1."""
    llm_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run it."""
    llm_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto uses bfloat16 where the hardware supports it."""
    llm_quantize: Literal["none", "4bit"] = "none"
    """4bit quantises the weights to 4 bits (needs CUDA and pip install bitsandbytes)."""
    llm_device_map: Literal["one", "auto"] = "one"
    """auto spreads the layers over all GPUs."""
    llm_batch: Annotated[int, within(1, LARGEST_BATCH)] = 16
    """Prompts per forward pass."""
    llm_max_tokens: Annotated[int | None, within(1)] = None
    """Longest answer in tokens (paper: 60, the default); a model that reasons first needs 2000 or more."""
    llm_model: str = ""
    """Server: which of its models to use; also the explainer's name in files."""
    llm_tokenizer: str = ""
    """Server: hub name or folder of the model's tokenizer; required to simulate."""
    llm_chat: bool = False
    """Server: use /chat/completions (explanations only)."""
    llm_concurrency: Annotated[int, within(1, 4096)] = 8
    """Server: number of concurrent requests."""
    llm_per_minute: Annotated[int | None, within(1)] = None
    """Server: largest number of requests per minute."""
    llm_timeout: Annotated[int, within(1, 86_400)] = 120
    """Server: seconds to wait for an answer before the request is retried."""
    llm_key_env: str = "OPENAI_API_KEY"
    """Server: environment variable that holds the API key."""

    @property
    def served(self) -> bool:
        """Is it a server's?"""
        return self.llm.lower().startswith(("http://", "https://"))

    @property
    def llm_name(self) -> str:
        """Name used in files; a server's address can change."""
        return self.llm_model if self.served else self.llm


@dataclass(frozen=True)
class ExplainConfig(Checked):
    """Ask an LLM for one phrase a neuron, from its highest-activating records."""

    run: PositionalPath
    """Run directory with neuron records."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to explain; all by default."""
    neurons: Annotated[int | None, within(1)] = None
    """Neurons per layer, drawn at random with --neuron-seed; all by default."""
    neuron_seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seed of the draw of neurons; a larger --neurons keeps those already done."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols to explain for (docs/evaluation.md); those that explain from the same windows share explanations."""
    prompts: Prompts = "own"
    """`own`, or `openai`: the exact ones, from an installed automated-interpretability."""
    worker: Worker = "auto"
    ray: RayTasks = 0
    ray_gpus: RayGPUs = 0
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)


@dataclass(frozen=True)
class SimulateConfig(Checked):
    """Predict activations from every explanation, and from the controls that a score is compared with."""

    run: PositionalPath
    """Run directory with explanations."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    explainer: str = "offline"
    """Explainer whose explanations to use: the --llm given to `explain`."""
    simulator: Simulator = "list-pmi"
    """`list-pmi` (one forward pass per explanation, ignores context), `list-in-context` (one per window), or
    `all-at-once` (OpenAI's protocol: values 0 to 10)."""
    neurons: Annotated[int | None, within(1)] = None
    """Use only this many of the explained neurons per layer; all by default."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols whose windows to simulate."""
    prompts: Prompts = "own"
    """Wording of all-at-once: `own`, or `openai` for OpenAI's, from an installed automated-interpretability."""
    reference_quirks: bool = False
    """all-at-once: read values as the reference code does (docs/evaluation.md)."""
    worker: Worker = "auto"
    ray: RayTasks = 0
    ray_gpus: RayGPUs = 0
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
class JudgeConfig(Checked):
    """Ask an LLM about whole windows instead of simulating: detection, fuzzing or intruder detection."""

    run: PositionalPath
    """Run directory with explanations."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    explainer: str = "offline"
    """Whose explanations: the --llm given to `explain`."""
    scorer: Scorer = "detection"
    """Does the window hold it; are the marked tokens it; which of five windows is foreign."""
    neurons: Annotated[int | None, within(1)] = None
    """Use only this many of the explained neurons per layer; all by default."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols whose explanations are judged; those that explain from the same windows are one."""
    worker: Worker = "auto"
    ray: RayTasks = 0
    ray_gpus: RayGPUs = 0
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)


@dataclass(frozen=True)
class ScoreConfig(Checked):
    """Compare simulated with true activations, beside every control, and say which measures may be trusted."""

    run: PositionalPath
    """Run directory with simulations."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    explainer: str = "offline"
    """Explainer whose explanations to use: the --llm given to `explain`."""
    simulator: Simulator = "list-pmi"
    """Simulator whose simulations to use, as given to `simulate`."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols to score; judgements (detection, fuzzing, intruder) are scored too where they exist."""


@dataclass(frozen=True)
class ExportConfig(Checked):
    """Write neuron records in another tool's format: OpenAI's NeuronRecord JSON, or delphi's cache of activations."""

    run: PositionalPath
    """Run directory with neuron records."""
    out: Path
    """Folder to write."""
    format: Literal["openai", "delphi"] = "openai"
    """`openai`: one {layer}/{neuron}.json per neuron; `delphi`: all non-zero activations (needs `collect --dump`)."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to write; all by default."""
    data: Path | None = None
    """delphi: the data folder given to `collect`; the run's own by default."""


@dataclass(frozen=True)
class ImportConfig(Checked):
    """Read OpenAI NeuronRecord JSON made elsewhere into a run directory, to explain, simulate and score it here."""

    source: PositionalPath
    """Folder with one {layer}/{neuron}.json per neuron."""
    out: Path
    """Run directory to write; it will hold records and a tokenizer, but no model."""


@dataclass(frozen=True)
class ShowConfig(Checked):
    """Print a card of one neuron: explanation, scores, moments, histogram, tokens and windows shaded by activation."""

    run: PositionalPath
    """Run directory with neuron records."""
    layer: Annotated[int, tyro.conf.Positional, within(0)]
    """The neuron's layer, counted from 0."""
    neuron: Annotated[int, tyro.conf.Positional, within(0)]
    """Its index in the layer, counted from 0."""
    site: str = "auto"
    """Site of the records, as given to `collect`."""
    explainer: str = "offline"
    """Explainer whose explanation to show: the --llm given to `explain`."""
    simulator: Simulator = "list-pmi"
    """Simulator whose scores to show."""


@dataclass(frozen=True)
class ReportConfig(Checked):
    """Write one self-contained HTML report of some runs, its numbers as CSV and JSON, its figures as SVG and PNG."""

    runs: PositionalPaths
    """Run directories."""
    out: Path
    """Folder to write."""
    explainer: str = "offline"
    """Explainer whose explanations to report."""
    simulator: Simulator = "list-pmi"
    """Simulator whose simulations to report."""
    primary: str = "uniform/pearson/shuffled"
    """The measure that decides, to be named before the runs: protocol/measure, with /control for the gain over a
    control (shuffled, empty, unigram, untrained). docs/evaluation.md explains the default. Others are secondary."""
    compare: tuple[str, ...] = ()
    """Two arms to compare, such as `crate gpt2`: these two by default if there are runs of both, else the first two
    arms among the runs."""
    title: str = "cratescope report"
    """Page title."""
    cards: Annotated[int, within(0, 10_000)] = 8
    """Neuron cards per layer, spread evenly over the ranking by score."""


@dataclass(frozen=True)
class ConvertConfig(Checked):
    """Turn the authors' nanoGPT-style checkpoint (.pt) into a Hugging Face folder, or such a folder back into a .pt."""

    source: PositionalPath
    """A .pt checkpoint, or a folder with config.json and model.safetensors."""
    out: PositionalPath
    """The folder, or the .pt file, to write."""


@dataclass(frozen=True)
class NeuronsConfig(Checked):
    """What the stages of a study that are about neurons share, its section [neurons]."""

    sites: tuple[str, ...] = ("auto",)
    """Sites to look at, each as in `collect --site`."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols to explain for, simulate, judge and score."""
    neurons: Annotated[int | None, within(1)] = None
    """How many neurons a layer, drawn at random by the seed; all by default."""
    neuron_seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Draws the neurons."""
    simulators: tuple[Simulator, ...] = ("list-pmi",)
    """Simulators, each with scores and a report of its own."""
    judges: tuple[Scorer, ...] = ()
    """Scorers of `judge`; none by default, unless there is a section [judge]."""
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)


@dataclass(frozen=True)
class StudyConfig(Checked):
    """Prepare, train, collect, explain, simulate, score and report a matrix of models described in one TOML file."""

    config: PositionalPath
    """TOML file; `studies/demo.toml` shows every section."""
    out: Path
    """Folder to write; finished work is skipped, so the same command resumes."""
