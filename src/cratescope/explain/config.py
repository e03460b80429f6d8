"""Settings of `explain`, `simulate` and `judge`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from cratescope.errors import UserError
from cratescope.llm.config import LLMConfig
from cratescope.options import LARGEST_SEED, Checked, PositionalPath, RayGPUs, RayTasks, Site, Worker, within


class Simulates(NamedTuple):
    """A simulator: where it is, what it needs of the LLM, and whether it takes --prompts and --reference-quirks."""

    place: str
    needs: Literal["nothing", "likeliest tokens", "whole vocabulary"]
    worded: bool = False


Simulator = Literal["list-pmi", "list-in-context", "all-at-once", "terms"]
SIMULATORS: dict[str, Simulates] = {
    "list-pmi": Simulates("simulators.list_pmi:ListPMI", "whole vocabulary"),
    "list-in-context": Simulates("simulators.list_in_context:ListInContext", "whole vocabulary"),
    "all-at-once": Simulates("simulators.all_at_once:AllAtOnce", "likeliest tokens", worded=True),
    "terms": Simulates("terms.predict:TermsSimulator", "nothing"),
}
Scorer = Literal["detection", "fuzzing", "intruder", "output"]
SCORERS: dict[str, str] = {
    "detection": "judges.yes_no:DETECTION",
    "fuzzing": "judges.yes_no:FUZZING",
    "intruder": "judges.intruder:INTRUDER",
    "output": "judges.output:OUTPUT",
}


def load(place: str) -> Any:
    """What stands at "module:name" of this room. Only now the module is imported, so that --help is instant."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"cratescope.explain.{module}"), name)


Prompts = Literal["own", "openai"]
Source = Literal["activations", "output", "both"]
"""What an explanation by a language model is made from."""
Explainer = Literal["llm", "terms", "selected"]
TERMS = "terms"
SELECTED = "selected"
"""Names of explainers in files, where a language model has its own."""
NOT_JUDGED = (TERMS, SELECTED)
"""Their explanations were chosen on windows that a judge would be shown; texts that are written are no windows."""
STRENGTH = 10.0
DEFAULT_PROTOCOLS = ("top-and-random", "random-only")


@dataclass(frozen=True)
class TermsConfig(Checked):
    """How the explainer `terms` chooses."""

    terms: Annotated[int, within(1, 64)] = 3
    """terms: the most of them in an explanation."""
    named_only: bool = True
    """terms: only what has a name in the language; otherwise also single words and pieces, in quotation marks."""
    joints: bool = False
    """terms: also what a word is together with where it stands, such as "numbers after commas"; takes longer."""
    language: Path | None = None
    """terms: TOML file of the language; the packaged one, which `cratescope terms` prints, by default."""


@dataclass(frozen=True)
class SelectedConfig(Checked):
    """What the explainer `selected` chooses from, and how."""

    among: tuple[str, ...] = ("offline", "terms")
    """selected: explainers whose explanations are candidates: names as of --explainer of later stages."""
    others: Annotated[int, within(0)] = 0
    """selected: explanations of so many neurons of the layer, the first drawn, are candidates of every other too."""
    select: Simulator = "list-pmi"
    """selected: simulator whose predictions are compared with the neuron, on windows that no protocol scores."""


@dataclass(frozen=True)
class LanguageConfig(Checked):
    """List all that explanations by terms may say: classes of words, parts of words, and places."""

    language: Path | None = None
    """TOML file of the language; the packaged one by default."""
    toml: bool = False
    """Print the packaged language as a TOML file, to make one's own from."""


@dataclass(frozen=True)
class ExplainConfig(Checked):
    """Say what each neuron finds: a phrase of an LLM from its top windows, or terms that follow its activations."""

    run: PositionalPath
    """Run directory with neuron records."""
    site: Site = "auto"
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to explain; all by default."""
    neurons: Annotated[int | None, within(1)] = None
    """Neurons per layer, drawn at random with --neuron-seed; all by default."""
    neuron_seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seed of the draw of neurons; a larger --neurons keeps those already done."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols to explain for (docs/evaluation.md); those that explain from the same windows share explanations."""
    explainer: Explainer = "llm"
    """`llm`; `terms`: weighted terms of a small language, chosen by a fit, without a language model; or `selected`:
    the best of what other explainers have said."""
    prompts: Prompts = "own"
    """llm: `own`, or `openai`: the exact ones, from an installed automated-interpretability."""
    windows: Annotated[int, within(0)] = 0
    """llm: 1, 2, ... explains from the next top windows instead, which its protocols do not score: one more candidate
    for --explainer selected, kept under the name of the LLM and `_windows1`."""
    from_: Annotated[Source, tyro.conf.arg(name="from")] = "activations"
    """llm: made from the words that excite a neuron (activations), from the tokens that it raises and lowers, which
    `cratescope effects` measures (output), or both; kept under the name of the LLM and `_output` or `_both`."""
    worker: Worker = "auto"
    ray: RayTasks = 0
    ray_gpus: RayGPUs = 0
    terms: Annotated[TermsConfig, tyro.conf.arg(name="")] = field(default_factory=TermsConfig)
    selected: Annotated[SelectedConfig, tyro.conf.arg(name="")] = field(default_factory=SelectedConfig)
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)

    @property
    def explainer_name(self) -> str:
        """Name used in files, and by --explainer of later stages."""
        asked = f"{self.llm.llm_name}_windows{self.windows}" if self.windows else self.llm.llm_name
        asked += "" if self.from_ == "activations" else f"_{self.from_}"
        return asked if self.explainer == "llm" else self.explainer

    def __post_init__(self) -> None:
        super().__post_init__()
        for owner, settings in (("terms", self.terms), ("selected", self.selected)):
            for name in _changed(settings):
                if self.explainer != owner and (self.explainer, name) != ("selected", "language"):
                    raise UserError(f"--{name}: goes with --explainer {owner}")
        if self.explainer == "selected" and self.terms.language and self.selected.select != "terms":
            raise UserError("--language: goes with --select terms")
        if self.explainer != "llm" and self.prompts != "own":
            raise UserError("--prompts: goes with --explainer llm")
        if self.explainer != "llm" and self.windows:
            raise UserError("--windows: goes with --explainer llm")
        self._check_from()

    def _check_from(self) -> None:
        if self.from_ == "activations":
            return
        if self.explainer != "llm":
            raise UserError(f"--from {self.from_}: goes with --explainer llm; {self.explainer} fits activations")
        if self.prompts != "own":
            raise UserError(f"--from {self.from_}: goes with --prompts own; OpenAI's prompt shows activations alone")
        if self.from_ == "output" and self.windows:
            raise UserError("--windows: goes with --from activations or both; effects are of no window")


def _changed(settings: Checked) -> list[str]:
    """The options, as on the command line, that are not at their defaults."""
    return [one.name.replace("_", "-") for one in fields(settings) if getattr(settings, one.name) != one.default]


@dataclass(frozen=True)
class SimulateConfig(Checked):
    """Predict activations from every explanation, and from the controls that a score is compared with."""

    run: PositionalPath
    """Run directory with explanations."""
    site: Site = "auto"
    explainer: str = "offline"
    """Explainer whose explanations to use: the --llm given to `explain`, or `terms`."""
    simulator: Simulator = "list-pmi"
    """`list-pmi` (one forward pass per explanation, ignores context), `list-in-context` (one per window),
    `all-at-once` (OpenAI's protocol: values 0 to 10), or `terms` (no LLM; explanations of the explainer terms)."""
    neurons: Annotated[int | None, within(1)] = None
    """Use only this many of the explained neurons per layer; all by default."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols whose windows to simulate."""
    prompts: Prompts = "own"
    """Wording of all-at-once: `own`, or `openai` for OpenAI's, from an installed automated-interpretability."""
    reference_quirks: bool = False
    """all-at-once: read values as the reference code does (docs/evaluation.md)."""
    language: Path | None = None
    """terms: the --language that was given to `explain`."""
    worker: Worker = "auto"
    ray: RayTasks = 0
    ray_gpus: RayGPUs = 0
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = SIMULATORS[self.simulator]
        if not kind.worded and (self.reference_quirks or self.prompts != "own"):
            raise UserError(
                f"--simulator {self.simulator} is our own; --reference-quirks and --prompts go with all-at-once"
            )
        if self.language and self.simulator != "terms":
            raise UserError("--language: goes with --simulator terms")
        if self.llm.served and (kind.needs == "whole vocabulary" or self.reference_quirks):
            raise UserError(
                f"--llm {self.llm.llm}: a server tells of the likeliest tokens only, and the list simulators and "
                "--reference-quirks need the whole vocabulary; use --simulator all-at-once, or run the model here "
                "(--llm HUB_NAME or FOLDER)"
            )
        if self.llm.served and kind.needs != "nothing" and not self.llm.llm_tokenizer:
            raise UserError(
                f"--llm {self.llm.llm}: simulating needs the tokenizer of the server's model; name it with "
                "--llm-tokenizer (hub name or folder)"
            )


@dataclass(frozen=True)
class JudgeConfig(Checked):
    """Ask an LLM about whole windows instead of simulating, or about texts that a neuron was forced in."""

    run: PositionalPath
    """Run directory with explanations."""
    site: Site = "auto"
    explainer: str = "offline"
    """Whose explanations: the --llm given to `explain`."""
    scorer: Scorer = "detection"
    """Does the window hold it; are the marked tokens it; which of five windows is foreign; or `output`: which of four
    texts did the model write with this neuron forced, and not another one of the layer."""
    strength: Annotated[float, within(0, 10_000, above=True)] = STRENGTH
    """output: what neurons are set to while the model writes, as a multiple of their maximum in the records."""
    neurons: Annotated[int | None, within(1)] = None
    """Use only this many of the explained neurons per layer; all by default."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols whose explanations are judged; those that explain from the same windows are one."""
    worker: Worker = "auto"
    ray: RayTasks = 0
    ray_gpus: RayGPUs = 0
    llm: Annotated[LLMConfig, tyro.conf.arg(name="")] = field(default_factory=LLMConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer != "output" and self.strength != STRENGTH:
            raise UserError("--strength: goes with --scorer output")
