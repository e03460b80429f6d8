"""A study: every stage for a matrix of models, described in one TOML file, and one report at the end.

A section of the file holds options of the subcommand of its name, so what a subcommand's --help says is true here
too. Stages skip what is already there: running a study again finishes what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import tomllib
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from rich.console import Console

from cratescope import config as settings
from cratescope.run import UserError, decode_text, first_line

Settings = dict[str, Any]

SECTIONS: dict[str, tuple[type, tuple[str, ...]]] = {
    "prepare": (settings.PrepareConfig, ("out",)),
    "train": (settings.TrainConfig, ("out", "data")),
    "evaluate": (settings.EvaluateConfig, ("run",)),
    "collect": (settings.CollectConfig, ("run",)),
    "explain": (settings.ExplainConfig, ("run",)),
    "simulate": (settings.SimulateConfig, ("run", "explainer")),
    "judge": (settings.JudgeConfig, ("run", "explainer")),
    "score": (settings.ScoreConfig, ("run", "explainer")),
    "report": (settings.ReportConfig, ("runs", "out", "title", "explainer")),
}
"""Section -> its settings, and the options that the study itself sets. [judge] runs only if it is present."""


def study(config: settings.StudyConfig) -> Path:
    """Run every stage, skipping finished work, and return the path of the report.

    Raises:
        UserError: the file is not TOML, or names an unknown section, option or value.
    """
    plan = read_plan(config.config)
    say = functools.partial(Console(stderr=True).print, markup=False)
    options, models, judging = check(plan, config.config)

    from cratescope.lm.data import prepare
    from cratescope.lm.evaluate import evaluate
    from cratescope.lm.train import train
    from cratescope.neurons.collect import collect

    data = config.out / "data"
    say(f"prepare {data}")
    prepare(options("prepare", out=data), Console(stderr=True))
    runs = [config.out / "runs" / name for name in models]
    for run, own in zip(runs, models.values(), strict=True):
        say(f"train, evaluate, collect {run}")
        train(options("train", own, out=run, data=data))
        result = evaluate(options("evaluate", run=run))
        margin = result["unigram_entropy"] - result["loss"]
        error = "-" if result["standard_error"] is None else f"{result['standard_error']:.3f}"
        say(
            f"  {result['split']} loss {result['loss']:.3f} +- {error} nats per token, "
            f"{margin:.3f} below the unigram entropy of {result['unigram_entropy']:.3f}"
        )
        collect(options("collect", run=run))
    explainer = _score_neurons(options, runs, judging, say)

    from cratescope.report.report import report

    say("report")
    given = {"runs": tuple(runs), "out": config.out / "report", "title": plan["title"], "explainer": explainer}
    return report(options("report", **given))


def check(plan: dict[str, Any], path: Path) -> tuple[Callable[..., Any], dict[str, Settings], list[Settings]]:
    """Check the options of every section, model and scorer of a plan that was read from `path`, and return them.

    Every section is parsed and its names are looked up at once, so that a mistake in the last one is found
    before hours of work on the first.

    Raises:
        UserError: an unknown option or a wrong value.
    """
    options = functools.partial(_options, path, plan)
    models = {model["name"]: {key: value for key, value in model.items() if key != "name"} for model in plan["model"]}
    judging = _judging(plan)
    several = {"train": list(models.values()), "judge": judging}
    for section, (_, given) in SECTIONS.items():
        for own in several.get(section, [{}]):
            names = dict.fromkeys(given, "x") | ({"title": plan["title"]} if section == "report" else {})
            parsed = options(section, own, **names)
            try:
                _look_up(parsed)
            except UserError as error:
                raise UserError(f"{path}: [{section}] {error}") from error
    return options, models, judging


def _look_up(parsed: Any) -> None:
    """Raise UserError for an unknown preset, protocol or measure."""
    from cratescope.models.presets import preset_config
    from cratescope.neurons.protocols import protocols_named
    from cratescope.results.compare import Quantity

    if isinstance(parsed, settings.TrainConfig):
        preset_config(parsed.preset, context=parsed.context, crate=parsed.crate)
    if isinstance(parsed, settings.ReportConfig):
        Quantity.parse(parsed.primary)
    if hasattr(parsed, "protocols"):
        protocols_named(parsed.protocols)


def _judging(plan: dict[str, Any]) -> list[Settings]:
    """One set of options per scorer, since `scorer` in [judge] may be a list. Empty without that section."""
    if "judge" not in plan:
        return []
    scorers = plan["judge"].get("scorer", settings.JudgeConfig.scorer)
    # An empty list stays the value of one scorer, which is then refused by name.
    return [{"scorer": scorer} for scorer in (scorers if isinstance(scorers, list) and scorers else [scorers])]


def _score_neurons(
    options: Callable[..., Any], runs: list[Path], judging: Sequence[Settings], say: Callable[[str], None]
) -> str:
    """Explain, simulate, judge and score every run, and return the name of the explainer."""
    from cratescope.neurons.explain import explain
    from cratescope.neurons.judge import judge
    from cratescope.neurons.score import score
    from cratescope.neurons.simulate import simulate

    explainer = options("explain", run="x").llm.llm_name
    for run in runs:
        say(f"explain, simulate, {'judge, ' if judging else ''}score {run}")
        explain(options("explain", run=run))
        simulate(options("simulate", run=run, explainer=explainer))
        for scorer in judging:
            judge(options("judge", scorer, run=run, explainer=explainer))
        score(options("score", run=run, explainer=explainer))
    return explainer


def read_plan(path: Path) -> dict[str, Any]:
    """The study file, checked for unknown sections and models without a name."""
    try:
        plan = tomllib.loads(decode_text(path.read_bytes(), errors="strict"))
        repr(plan)  # fails for a hexadecimal number of more digits than Python writes, which no message could name
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `studies/demo.toml` is an example") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, a number of 5000 digits, brackets without end
        raise UserError(f"{path}: not valid TOML ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    unknown = plan.keys() - SECTIONS.keys() - {"title", "model"}
    if unknown:
        raise UserError(f"{path}: no section [{sorted(unknown)[0]}]; there are {', '.join(SECTIONS)} and [[model]]")
    for name in SECTIONS.keys() & plan.keys():
        if not isinstance(plan[name], dict):
            raise UserError(f"{path}: {name} is a section; write [{name}] and its options below it")
    models = plan.get("model", [])
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise UserError(f"{path}: write [[model]] with two brackets, one for each model")
    if not models:
        raise UserError(f"{path}: give at least one [[model]], each with a name of its own")
    seen: set[str] = set()
    for model in models:
        name = model.get("name")
        # Two folders of a disk that takes small and capital letters for the same would be one.
        alike = unicodedata.normalize("NFC", str(name)).casefold()
        if reason := "is the name of another one too" if alike in seen else _unfit(name):
            raise UserError(f"{path}: [[model]] name = {name!r:.60} {reason}; write each with a name of its own")
        seen.add(alike)
    title = plan.get("title", path.stem)
    if not isinstance(title, str) or not title.strip():
        raise UserError(f"{path}: title = {title!r:.60} is not a title; give some words or leave it out")
    return plan | {"title": title}


LONGEST_NAME = 160
"""Most bytes in a model's name; file systems allow 255."""


def _unfit(name: Any) -> str | None:
    """Say why a model's folder cannot have this name; None when it can."""
    if not isinstance(name, str) or not name:
        return "is not a name"
    if len(name.encode()) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    if "/" in name or "\\" in name or any(unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp") for sign in name):
        return "has a slash or an invisible character in it, which a folder's name cannot have"
    if name.startswith(".") or name != name.strip() or name.endswith("."):
        return "begins or ends with a dot or a space"
    return None


def _options(path: Path, plan: dict[str, Any], section: str, own: dict[str, Any] | None = None, **given: Any) -> Any:
    """Settings of a section: the study's values over the file's (`own`: those of one model) over the defaults."""
    kind, reserved = SECTIONS[section]
    from_file = plan.get(section, {}) | (own or {})
    taken = sorted(from_file.keys() & set(reserved))
    if taken:
        raise UserError(f"{path}: [{section}] {taken[0]} is given by the study itself; leave it out")
    return parse_options(kind, from_file | given, f"{path}: [{section}]")


def parse_options(kind: type[settings.Config], options: dict[str, Any], where: str) -> settings.Config:
    """Parse named options into settings of `kind`, with the same code as the command line.

    Raises:
        UserError: an unknown option or a value of the wrong type; `where` begins the message.
    """
    hints = get_type_hints(kind) | (get_type_hints(settings.LLMConfig) if "llm" in get_type_hints(kind) else {})
    arguments: list[str] = []
    positional: list[str] = []
    for name, value in options.items():
        if name not in hints:
            raise UserError(f"{where} has no option {name!r:.60}; see `cratescope <section> --help`")
        if not _of_type(value, hints[name]):
            raise UserError(f"{where} {name} = {value!r:.60} is not a value it takes")
        values = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
        if isinstance(value, dict):
            values = [str(part) for pair in value.items() for part in pair]
        if name in ("source", "run", "runs") or (name == "out" and kind is settings.TrainConfig):
            positional += values
        elif isinstance(value, bool):
            arguments.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif len(values) == 1:
            arguments.append(f"--{name.replace('_', '-')}={values[0]}")  # the value may begin with a hyphen
        else:
            arguments += [f"--{name.replace('_', '-')}", *values]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return settings.parse(kind, [*positional, *arguments])
    except SystemExit as error:
        raise UserError(f"{where} {_refused(options, kind, said.getvalue())}") from error
    except UserError as error:
        raise UserError(f"{where} {error}") from error


def _of_type(value: Any, hint: Any) -> bool:
    """Whether a TOML value has the option's type, as far as the command line, where everything is text, cannot tell."""
    kinds = {get_origin(part) or part for part in (hint, *get_args(hint))}
    if isinstance(value, dict):
        return dict in kinds and all(isinstance(one, str | int | float) for one in value.values())
    if isinstance(value, list | tuple):
        wanted = next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is tuple), None)
        fits = wanted is not None and (... in wanted or len(value) == len(wanted))
        return fits and all(_of_type(one, str) for one in value)
    if isinstance(value, bool) or bool in kinds:
        return isinstance(value, bool) and bool in kinds
    return isinstance(value, str | float | Path) or isinstance(value, int) and abs(value) < 2**63  # as TOML has it


def _refused(options: Settings, kind: type, said: str) -> str:
    """Find out from the command line's message which option it refused."""
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in options and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        return f"{missing[0]} is missing"
    found = (name.replace("-", "_") for name in re.findall(r"--([a-z-]+)", said))
    # Else it is a value that begins with a hyphen, in a list.
    others = (name for name, value in options.items() if isinstance(value, list) and any(str(v) in said for v in value))
    named = next((name for name in (*found, *others) if name in options), "an option")
    return f"{named} = {options.get(named)!r:.60} is not a value it takes"
