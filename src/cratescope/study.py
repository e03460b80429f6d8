"""A study: every stage for a matrix of models, described in one TOML file, and one report at the end.

A section of the file holds options of the subcommand of its name, so what a subcommand's --help says is true here
too; [neurons] gives what several of them share. Stages skip what is already there: running a study again finishes what
is missing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cratescope.arm import Arm
from cratescope.config import BesideConfig, CodersConfig, NeuronsConfig, StudyConfig
from cratescope.errors import UserError, first_line
from cratescope.explain.config import JudgeConfig
from cratescope.files import decode_text, slug
from cratescope.lm.config import EvaluateConfig, TrainConfig
from cratescope.options import from_table, option_types
from cratescope.report.config import ReportConfig
from cratescope.run import Run
from cratescope.stages import STAGES

Settings = dict[str, Any]

GIVEN = {
    "prepare": ("out",),
    "train": ("out", "data"),
    "evaluate": ("run", "sae"),
    "collect": ("run", "model"),
    "effects": ("run",),
    "explain": ("run",),
    "simulate": ("run", "explainer"),
    "judge": ("run", "explainer"),
    "score": ("run", "explainer"),
    "steer": ("run", "edit", "neuron", "json"),
    "report": ("runs", "out", "title", "explainer"),
}
"""Section -> the options that the study itself gives. Without judges there is no [judge]; [steer] and [effects] have to
be there."""
SHARED = "neurons"
"""The section of what several sections share: an option of it is one of every stage that has it."""
OWN = {"effects": {"neurons"}}
"""But for these: how many neurons a language model explains says nothing of what is measured without one."""
BESIDE = "terms"
"""The section of explanations by terms beside those of a language model."""
ALSO = {"explain": ("layers", "neuron_seed", "protocols"), "simulate": ("protocols",)}
"""Options of a section that hold for terms, too; others are about the language model."""
MODEL, CODERS = "model", "sae"
"""Tables that a study may have several of, each with a name."""
RUN = "run"
"""Option of a [[model]] that is there already, as a run directory or in the zoo."""
LOOPS = {"sites": "site", "simulators": "simulator", "judges": "scorer"}
"""Options of [neurons] that name several, and what each of them is in the sections that have it."""


@dataclass(frozen=True)
class Plan:
    """A study file, checked: sections hold what [neurons] shares with them.

    models: by name, the options of training that are a model's own, or only the `run` of one that is there.
    sites, simulators, judges: as they were given.
    milestones: whether the language model explains those, too.
    terms: section [terms], if there is one.
    coders: every [[sae]].
    steering: whether there is a section [steer]: sweeps of the models at the end of training.
    effects: whether there is a section [effects], of all models that are explained.
    """

    path: Path
    title: str
    sections: dict[str, Settings]
    models: dict[str, Settings]
    sites: tuple[str, ...]
    simulators: tuple[str, ...]
    judges: tuple[Any, ...]
    milestones: bool = True
    terms: Settings | None = None
    coders: tuple[CodersConfig, ...] = ()
    steering: bool = False
    effects: bool = False

    @property
    def explaining(self) -> list[Plan]:
        """One for each explainer: the section [terms] adds one, which reports come first."""
        if self.terms is None:
            return [self]
        kept = {name: {k: v for k, v in self.sections[name].items() if k in also} for name, also in ALSO.items()}
        kept["score"] = dict(self.sections["score"])
        kept["explain"] |= {"explainer": "terms"} | self.terms
        for section, shared in (("simulate", ("language", "protocols")), ("score", ("protocols",))):
            kept[section] |= {name: self.terms[name] for name in shared if name in self.terms}
        beside = replace(self, sections=self.sections | kept, simulators=("terms",), judges=(), milestones=True)
        return [beside, self]

    @property
    def explainer(self) -> str:
        """Name of the explainer in files."""
        name: str = self.options("explain", run="x").explainer_name
        return name

    def reading(self, data: Path) -> Plan:
        """The same plan, in which every model reads `data` where the file names no other."""
        given = {name: {"data": data} | self.sections[name] for name in ("evaluate", "collect", "effects", "steer")}
        coders = tuple(replace(one, sae=replace(one.sae, data=data)) for one in self.coders)
        return replace(self, sections=self.sections | given, coders=coders)

    def coders_of(self, model: str) -> list[CodersConfig]:
        """The [[sae]] that a model gets."""
        return [one for one in self.coders if one.models is None or model in one.models]

    def options(self, section: str, own: Settings | None = None, **given: Any) -> Any:
        """The settings of a section: what the study gives, over a model's `own`, over the file's, over the defaults."""
        from_file = self.sections.get(section, {}) | (own or {})
        for name in sorted(from_file.keys() & set(GIVEN[section])):
            raise UserError(f"{self.path}: [{section}] {name} is given by the study itself; leave it out")
        return from_table(STAGES[section].config, from_file | given, f"{self.path}: [{section}]")

    def do(self, section: str, own: Settings | None = None, **given: Any) -> Any:
        """Run the stage of a section."""
        return STAGES[section].load()(self.options(section, own, **given))

    def training(self, out: Path) -> Iterator[tuple[TrainConfig | None, list[Run]]]:
        """The training settings of each model, and its runs: the final one and its milestones.

        A model that is there is not trained: it has no settings, and only the run that was given.
        """
        from cratescope.lm.trainer import milestone_steps

        for name, own in self.models.items():
            if RUN in own:
                yield None, [Run(own[RUN])]
                continue
            config = self.options("train", own, out=out / "runs" / name, data=out / "data")
            run = Run(config.out)
            yield config, [run, *(run.milestone(step) for step in sorted(milestone_steps(config)))]


def study(config: StudyConfig) -> Path:
    """Run what is not done yet of every stage and return the path of the report, the first simulator's if of several.

    Every stage is done for the model at the end of training and for each of its milestones; those the language model
    leaves out if [neurons] says so.

    Raises:
        UserError: the file is not TOML, or names an unknown section, option or value.
    """
    plan = check(read_plan(config.config), config.config).reading(config.out / "data")
    training = list(plan.training(config.out))
    _check_names(plan, [run.name for _, runs in training for run in runs])
    say = functools.partial(Console(stderr=True).print, markup=False)
    say(f"prepare {config.out / 'data'}")
    plan.do("prepare", out=config.out / "data")
    sites: dict[Path, list[str]] = {}
    for name, (how, runs) in zip(plan.models, training, strict=True):
        sites |= _measure(plan, name, how, runs, say)
    for root in sites if plan.effects else ():
        for site in sites[root]:
            say(f"effects {root} {site}")
            plan.do("effects", run=root, site=site)
    ends = {runs[0].root for _, runs in training}
    explained = {one.explainer: [root for root in sites if one.milestones or root in ends] for one in plan.explaining}
    for one in plan.explaining:
        for root in explained[one.explainer]:
            for site in sites[root]:
                _score_neurons(one, {"run": root, "site": site}, say)
    say("report")
    pages: list[Path] = []
    for one in plan.explaining:
        for simulator in one.simulators:
            folder = config.out / (f"report-{simulator}" if pages else "report")
            given: Settings = {"title": plan.title, "explainer": one.explainer, "simulator": simulator}
            pages.append(plan.do("report", runs=tuple(explained[one.explainer]), out=folder, **given))
    return pages[0]


def _measure(
    plan: Plan, name: str, how: TrainConfig | None, runs: list[Run], say: Callable[[str], None]
) -> dict[Path, list[str]]:
    """Train a model, evaluate it and its milestones, and collect their neurons: the sites of each run."""
    sites = {}
    if how:
        say(f"train {how.out}")
        STAGES["train"].load()(how)
    for run in runs:
        if run != runs[0] and not run.manifest.exists():  # added to the file when training was past it
            say(f"  {run.name} was not kept and is left out")
            continue
        say(f"evaluate, collect {run.root}")
        say(_loss(plan.do("evaluate", run=run.root)))
        collected = [plan.do("collect", run=run.root, site=site) for site in plan.sites]
        if run == runs[0] and plan.coders_of(name):
            collected += _collect_features(plan, plan.coders_of(name), run, say)
        if run == runs[0] and plan.steering:
            _steer(plan, plan.coders_of(name), run, say)
        sites[run.root] = list(dict.fromkeys(folder.name for folder in collected))
    return sites


def _collect_features(plan: Plan, coders: list[CodersConfig], run: Run, say: Callable[[str], None]) -> list[Path]:
    """Train the sparse autoencoders of a model, and collect their features: the folders of records."""
    from cratescope.neurons.coded import SAE

    for one in coders:
        say(f"sae {one.sae.name} {run.root}")
        STAGES[CODERS].load()(replace(one.sae, run=run.root))
    names = [name for one in coders for name in one.names]
    say(f"evaluate, collect {SAE}{', '.join(names)} {run.root}")
    plan.do("evaluate", run=run.root, sae=names)
    return [
        plan.do("collect", _of_coders(one), run=run.root, site=f"{SAE}{name}") for one in coders for name in one.names
    ]


def _steer(plan: Plan, coders: list[CodersConfig], run: Run, say: Callable[[str], None]) -> None:
    """Sweep a model's neurons, and its features as differences and in place of the activations."""
    from cratescope.neurons.coded import SAE

    units = [(site, "delta") for site in plan.sites]
    units += [(f"{SAE}{name}", mode) for mode in ("delta", "replace") for one in coders for name in one.names]
    for site, mode in units:
        say(f"steer {run.root} {site}{'' if mode == 'delta' else f' ({mode})'}")
        plan.do("steer", {"sweep": True, "sae": mode}, run=run.root, site=site)


def _of_coders(coders: CodersConfig) -> Settings:
    """The options of `collect` for the features of a [[sae]]."""
    found: Settings = {"layers": coders.sae.layers, "sample": coders.features}
    return {name: value for name, value in found.items() if value is not None}


def _score_neurons(plan: Plan, place: Settings, say: Callable[[str], None]) -> None:
    """Explain, judge, simulate and score the neurons of one site of a run."""
    explainer = plan.explainer
    say(f"explain by {explainer}, {'judge, ' if plan.judges else ''}simulate, score {place['run']} {place['site']}")
    plan.do("explain", **place)
    for scorer in plan.judges:
        plan.do("judge", **place, explainer=explainer, scorer=scorer)
    for simulator in plan.simulators:
        plan.do("simulate", **place, explainer=explainer, simulator=simulator)
        plan.do("score", **place, explainer=explainer, simulator=simulator)


def _loss(result: Settings) -> str:
    margin = result["unigram_entropy"] - result["loss"]
    side = "below" if margin >= 0 else "above"
    error = "-" if result["standard_error"] is None else f"{result['standard_error']:.3f}"
    return (
        f"  {result['split']} loss {result['loss']:.3f} +- {error} nats per token, "
        f"{abs(margin):.3f} {side} the unigram entropy of {result['unigram_entropy']:.3f}"
    )


def _check_names(plan: Plan, names: list[str]) -> None:
    """Refuse a model named like a milestone of another: a report could not tell them apart."""
    for name in plan.models:
        if names.count(name) > 1:
            raise UserError(f"{plan.path}: [[model]] name = {name!r} is the name of a milestone too; give another one")


def check(table: Settings, path: Path) -> Plan:
    """The plan of a study file that was read from `path`.

    Every section is parsed and its names are looked up at once, so that a mistake in the last one is found
    before hours of work on the first.

    Raises:
        UserError: an unknown option, a wrong value, or options of two sections that contradict each other.
    """
    where = f"{path}: [{SHARED}]"
    shared = from_table(NeuronsConfig, table.get(SHARED, {}), where)
    _look_up(shared, where)
    plan = _plan(table, path, shared)
    # Sections that say themselves what the others then take come first, to be the ones that are blamed.
    for section in sorted(GIVEN, key=lambda name: plan.sections[name].keys().isdisjoint(LOOPS.values())):
        for own in _variants(plan, section):
            _look_up(plan.options(section, own, **dict.fromkeys(GIVEN[section], "x")), f"{path}: [{section}]")
    _look_up_explainers(plan)
    if not plan.effects and (source := plan.options("explain", run="x").from_) != "activations":
        raise UserError(f"{path}: [explain] from = {source!r} needs effects; add a section [effects]")
    for section, options in plan.sections.items():
        for several, single in LOOPS.items():
            if single in options and _listed(options[single]) != getattr(plan, several):
                raise UserError(
                    f"{path}: [{section}] {single} = {options[single]!r:.60} contradicts what another section says of "
                    f"{several}: {', '.join(map(str, getattr(plan, several)))}; give them once, in [{SHARED}]"
                )
    plan = replace(plan, coders=tuple(_coders(one, plan) for one in table.get(CODERS, [])))
    _look_up_coders(plan)
    _look_up_sites(plan)
    _look_up_arms(plan)
    return plan


def _coders(table: Settings, plan: Plan) -> CodersConfig:
    """The settings of a [[sae]]. Its layers are those of [collect] unless it says others."""
    where = f"{plan.path}: [[{CODERS}]] {table['name']}:"
    for name in sorted(table.keys() & {"run", "data"}):
        raise UserError(f"{where} {name} is given by the study itself; leave it out")
    layers = plan.options("collect", run="x").layers
    found = from_table(CodersConfig, ({"layers": layers} if layers else {}) | table | {"run": "x"}, where)
    for model in found.models or ():
        if model not in plan.models:
            raise UserError(f"{where} models = {model!r:.60} is no [[model]]; there are {', '.join(plan.models)}")
    return found


def _plan(table: Settings, path: Path, neurons: NeuronsConfig) -> Plan:
    """The plan, with the options of [neurons] copied into the sections that have them."""
    shared = table.get(SHARED, {})
    sections = {name: dict(table.get(name, {})) for name in GIVEN}
    for section, options in sections.items():
        for name in shared.keys() & option_types(STAGES[section].config).keys() - OWN.get(section, set()):
            if options.setdefault(name, shared[name]) != shared[name]:
                raise UserError(
                    f"{path}: [{section}] {name} = {options[name]!r:.60} contradicts [{SHARED}] {name} = "
                    f"{shared[name]!r:.60}; give it in one of them"
                )
    loops: dict[str, tuple[Any, ...]] = {several: getattr(neurons, several) for several in LOOPS}
    if "judge" in table:
        loops["judges"] = (JudgeConfig.scorer,)
    for several, single in LOOPS.items():
        if several in shared:
            loops[several] = getattr(neurons, several)
        elif given := [options[single] for options in sections.values() if single in options]:
            loops[several] = _listed(given[0])
    models = {model["name"]: {key: value for key, value in model.items() if key != "name"} for model in table["model"]}
    terms = table.get(BESIDE)
    _look_up(from_table(BesideConfig, terms or {}, f"{path}: [{BESIDE}]"), f"{path}: [{BESIDE}]")
    return Plan(
        path,
        table["title"],
        sections,
        models,
        **loops,
        milestones=neurons.explain_milestones,
        terms=terms,
        steering="steer" in table,
        effects="effects" in table,
    )


def _listed(value: Any) -> tuple[Any, ...]:
    """Several values, or one; an empty list stays one value, which is then refused by name."""
    return tuple(value) if isinstance(value, list) and value else (value,)


def _variants(plan: Plan, section: str) -> list[Settings]:
    """The options of a section that change from one run of its stage to the next."""
    if section == "train":
        return [own for own in plan.models.values() if RUN not in own]
    known, options = option_types(STAGES[section].config), plan.sections[section]
    loops = {single: several for several, single in LOOPS.items() if single in known}
    values = (_listed(options[one]) if one in options else getattr(plan, several) for one, several in loops.items())
    return [dict(zip(loops, chosen, strict=True)) for chosen in itertools.product(*values)]


def _look_up(parsed: Any, where: str) -> None:
    """Raises UserError for an unknown preset, text, protocol or measure."""
    from cratescope.explain.protocols import protocols_named
    from cratescope.lm.evaluate import SPLITS
    from cratescope.models.presets import preset_config
    from cratescope.results.compare import Quantity
    from cratescope.text.sets import find_set

    with _blaming(where):
        if isinstance(parsed, TrainConfig):
            parsed.penalty_of(preset_config(parsed.preset, context=parsed.context, crate=parsed.crate))
        if isinstance(parsed, EvaluateConfig):
            for name in set(parsed.on) - set(SPLITS):
                find_set(name)
        if isinstance(parsed, ReportConfig):
            Quantity.parse(parsed.primary)
        if (protocols := getattr(parsed, "protocols", None)) is not None:
            protocols_named(protocols)


def _look_up_explainers(plan: Plan) -> None:
    """Raises UserError for explainers that are the same, an invalid language, or more neurons than are collected."""
    from cratescope.explain.terms.language import load_language

    sample = plan.options("collect", run="x", site="auto").sample
    for one in plan.explaining:
        where = f"{plan.path}: [{'explain' if one is plan else BESIDE}]"
        config = one.options("explain", run="x")
        if sample is not None and (config.neurons or 0) > sample:
            raise UserError(f"{where} neurons = {config.neurons} is more than [collect] sample = {sample}; raise that")
        if config.explainer == "selected":
            raise UserError(
                f"{where} explainer = 'selected': a study explains by an LLM and by terms; run `cratescope explain "
                "--explainer selected` on its runs afterwards"
            )
        if one is plan and plan.terms is not None and config.explainer == "terms":
            raise UserError(f"{where} explainer = 'terms' is what [{BESIDE}] adds; leave out one of them")
        if config.terms.language:
            with _blaming(f"{where} language:"):
                load_language(config.terms.language)


def _look_up_coders(plan: Plan) -> None:
    """Raises UserError for a wrong grid, two autoencoders of a model and name, or what contradicts [explain]."""
    taken: dict[str, set[str]] = {model: set() for model in plan.models}
    for one in plan.coders:
        where = f"{plan.path}: [[{CODERS}]] {one.sae.name}:"
        with _blaming(where):
            names = {slug(name).casefold(): name for name in (one.sae.name, *one.names)}  # a grid has a folder, too
        for model in sorted({*(one.models or plan.models)}):
            if twice := names.keys() & taken[model]:
                fix = "give it another name, or other models"
                raise UserError(f"{where} {model} has another {names[min(twice)]!r} already; {fix}")
            taken[model] |= names.keys()
        for explaining in plan.explaining:
            _look_up_features(one, explaining.options("explain", run="x"), where)


def _look_up_features(coders: CodersConfig, explain: Any, where: str) -> None:
    """Raises UserError for more features, or other layers, to explain than are collected."""
    if coders.features and (explain.neurons or 0) > coders.features:
        raise UserError(
            f"{where} features = {coders.features} are fewer than the {explain.neurons} neurons per layer that "
            f"{explain.explainer_name} explains; raise it, or lower neurons"
        )
    layers = coders.sae.layers
    if layers and (lacking := {*(explain.layers or ())} - {*layers}):
        raise UserError(f"{where} layers = {list(layers)} lacks layer {min(lacking)} of [explain] layers; add it")


def _look_up_sites(plan: Plan) -> None:
    """Raises UserError for a site or a layer that one of the models does not have."""
    from cratescope.models.folder import skeleton
    from cratescope.neurons.coded import SAE

    if coded := [site for site in plan.sites if site.startswith(SAE)]:
        raise UserError(f"{plan.path}: site {coded[0]!r:.60}: a [[{CODERS}]] adds its features by itself; leave it out")
    layers = plan.options("collect", run="x", site="auto").layers
    for name, own in plan.models.items():
        with _blaming(f"{plan.path}: [[{MODEL}]] {name}:"):
            blank = skeleton(_shape(plan, own))
            for site in plan.sites:
                _look_up_site(blank, site, layers)
        for one in plan.coders_of(name):
            with _blaming(f"{plan.path}: [[{CODERS}]] {one.sae.name}: model {name}:"):
                _look_up_site(blank, one.sae.site, one.sae.layers)


def _look_up_arms(plan: Plan) -> None:
    """Raises UserError for arms to compare that no model is of."""
    arms = [
        Arm.of(Run(own[RUN]).read_manifest()) if RUN in own else plan.options("train", own, out="x", data="x").arm(0)
        for own in plan.models.values()
    ]
    names = list(dict.fromkeys(arm.name for arm in arms))
    for chosen in plan.options("report", runs=("x",), out="x").compare:
        # What follows a plus, a dictionary or a site, is known once there are records.
        if not any(chosen == name or chosen.startswith(f"{name} + ") for name in names):
            raise UserError(f"{plan.path}: [report] compare: {chosen!r:.60} is none of the arms {', '.join(names)}")


def _look_up_site(blank: Any, name: str, layers: Sequence[int] | None) -> None:
    """Raises UserError for a site or a layer that a model does not have."""
    from cratescope.neurons.sites import site_named

    site = site_named(name, blank)
    for layer in layers or site.layers(blank) or [0]:
        site.module(blank, layer)


@contextlib.contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Begin errors with the part of the file that they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where} {error}") from error


def _shape(plan: Plan, own: Settings) -> Any:
    """Configuration of a model, from its run where it is there already."""
    from cratescope.models.folder import model_config
    from cratescope.models.presets import preset_config

    if RUN in own:
        run = Run(own[RUN])
        run.read_manifest()
        return model_config(run.trained_model())
    config = plan.options("train", own, out="x", data="x")
    return preset_config(config.preset, context=config.context, crate=config.crate)


def read_plan(path: Path) -> dict[str, Any]:
    """The study file, checked for unknown sections, and models and dictionaries without a name."""
    try:
        plan = tomllib.loads(decode_text(path.read_bytes(), errors="strict"))
        repr(plan)  # fails for a hexadecimal number of more digits than Python writes, which no message could name
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `studies/demo.toml` is an example") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, a number of 5000 digits, brackets without end
        raise UserError(f"{path}: not valid TOML ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    sections, tables = (*GIVEN, SHARED, BESIDE), (MODEL, CODERS)
    unknown = plan.keys() - {*sections, *tables, "title"}
    if unknown:
        known = f"{', '.join(sections)}, [[{MODEL}]] and [[{CODERS}]]"
        raise UserError(f"{path}: no section [{sorted(unknown)[0]}]; there are {known}")
    for name in plan.keys() & {*sections}:
        if not isinstance(plan[name], dict):
            raise UserError(f"{path}: {name} is a section; write [{name}] and its options below it")
    for kind in plan.keys() & {*tables}:
        _check_names_in(plan[kind], kind, path)
    if not plan.get(MODEL):
        raise UserError(f"{path}: give at least one [[{MODEL}]], each with a name of its own")
    title = plan.get("title", path.stem)
    if not isinstance(title, str) or not title.strip():
        raise UserError(f"{path}: title = {title!r:.60} is not a title; give some words or leave it out")
    return plan | {"title": title}


def _check_names_in(tables: Any, kind: str, path: Path) -> None:
    """Raises UserError for tables that are none, or without names of their own; models that are there get theirs."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: write [[{kind}]] with two brackets, one for each")
    seen: set[str] = set()
    for table in tables:
        if kind == MODEL and RUN in table:
            table["name"] = _name_of_run(table, path)
        name = table.get("name")
        # Two folders of a disk that takes small and capital letters for the same would be one.
        alike = unicodedata.normalize("NFC", str(name)).casefold()
        if reason := "is the name of another one too" if alike in seen else _unfit(name):
            raise UserError(f"{path}: [[{kind}]] name = {name!r:.60} {reason}; write each with a name of its own")
        if kind == MODEL:  # different models may have dictionaries of the same name
            seen.add(alike)


def _name_of_run(model: Settings, path: Path) -> str:
    """Name of a model that is there: its folder's."""
    if not isinstance(model[RUN], str) or not model[RUN] or "\0" in model[RUN]:
        raise UserError(f"{path}: [[model]] run = {model[RUN]!r:.60} is not a path of a run directory")
    if more := sorted(model.keys() - {RUN}):
        raise UserError(f"{path}: [[model]] run = {model[RUN]!r:.60} is there already; leave out {more[0]}")
    return Run(model[RUN]).name


LONGEST_NAME = 160
"""Most bytes in a name; file systems allow 255."""


def _unfit(name: Any) -> str | None:
    """Say why a folder cannot have this name; None when it can."""
    if not isinstance(name, str) or not name:
        return "is not a name"
    if len(name.encode()) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    if "/" in name or "\\" in name or any(unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp") for sign in name):
        return "has a slash or an invisible character in it, which a folder's name cannot have"
    if name.startswith(".") or name != name.strip() or name.endswith("."):
        return "begins or ends with a dot or a space"
    return None
