"""A study: every stage for a matrix of models, described in one TOML file, and one report at the end.

A section of the file holds options of the subcommand of its name, so what a subcommand's --help says is true here
too. Stages skip what is already there: running a study again finishes what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cratescope import config as settings
from cratescope.run import UserError, decode_text

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
"""Section -> its settings, and the options that the study itself gives. [judge] is done only if it is there."""


def study(config: settings.StudyConfig) -> Path:
    """Run what is not done yet of every stage and return the path of the report.

    Raises:
        UserError: the file is not TOML, or names an unknown section, option or value.
    """
    plan = read_plan(config.config)
    say = Console(stderr=True).print
    options, models, judging = check(plan, config.config)

    from cratescope.lm.data import prepare
    from cratescope.lm.evaluate import evaluate
    from cratescope.lm.train import train
    from cratescope.neurons.collect import collect

    data = config.out / "data"
    say(f"[bold]prepare[/] {data}")
    prepare(options("prepare", out=data), Console(stderr=True))
    runs = [config.out / "runs" / name for name in models]
    for run, own in zip(runs, models.values(), strict=True):
        say(f"[bold]train, evaluate, collect[/] {run}")
        train(options("train", own, out=run, data=data))
        result = evaluate(options("evaluate", run=run))
        margin = result["unigram_entropy"] - result["loss"]
        error = "-" if result["standard_error"] is None else f"{result['standard_error']:.3f}"
        say(
            f"  {result['split']} loss {result['loss']:.3f} +- {error} nats a token, "
            f"{margin:.3f} below the unigram entropy of {result['unigram_entropy']:.3f}"
        )
        collect(options("collect", run=run))
    explainer = _score_neurons(options, runs, judging, say)

    from cratescope.report.report import report

    say("[bold]report[/]")
    given = {"runs": tuple(runs), "out": config.out / "report", "title": plan["title"], "explainer": explainer}
    return report(options("report", **given))


def check(plan: dict[str, Any], path: Path) -> tuple[Callable[..., Any], dict[str, Settings], list[Settings]]:
    """The options of every section, every model and every scorer of a plan that was read from `path`.

    Every section is parsed once, so that a mistake in the last one is found before hours of work on the first.

    Raises:
        UserError: an unknown option or a wrong value.
    """
    options = functools.partial(_options, path, plan)
    models = {model["name"]: {key: value for key, value in model.items() if key != "name"} for model in plan["model"]}
    judging = _judging(plan)
    several = {"train": list(models.values()), "judge": judging}
    for section, (_, given) in SECTIONS.items():
        for own in several.get(section, [{}]):
            options(section, own, **dict.fromkeys(given, "x"))
    return options, models, judging


def _judging(plan: dict[str, Any]) -> list[Settings]:
    """One set of options a scorer: `scorer` of [judge] may be a list. Empty without that section."""
    if "judge" not in plan:
        return []
    scorers = plan["judge"].get("scorer", settings.JudgeConfig.scorer)
    return [{"scorer": scorer} for scorer in (scorers if isinstance(scorers, list) else [scorers])]


def _score_neurons(
    options: Callable[..., Any], runs: list[Path], judging: Sequence[Settings], say: Callable[[str], None]
) -> str:
    """Explain, simulate, judge and score every run, and return the name of the explainer."""
    from cratescope.neurons.explain import explain
    from cratescope.neurons.judge import judge
    from cratescope.neurons.score import score
    from cratescope.neurons.simulate import simulate

    explainer = options("explain", run="").llm.llm
    for run in runs:
        say(f"[bold]explain, simulate, {'judge, ' if judging else ''}score[/] {run}")
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
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `studies/demo.toml` is an example") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and arrays nested too deeply
        raise UserError(f"{path}: not valid TOML ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    unknown = plan.keys() - SECTIONS.keys() - {"title", "model"}
    if unknown:
        raise UserError(f"{path}: no section [{sorted(unknown)[0]}]; there are {', '.join(SECTIONS)} and [[model]]")
    for name in SECTIONS.keys() & plan.keys():
        if not isinstance(plan[name], dict):
            raise UserError(f"{path}: {name} is a section; write [{name}] and its options below it")
    models = plan.get("model", [])
    if not isinstance(models, list):
        raise UserError(f"{path}: write [[model]] with two brackets, one for each model")
    names = [model.get("name") for model in models]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names) or not names:
        raise UserError(f"{path}: give at least one [[model]], each with a name of its own")
    return {"title": path.stem} | plan


def _options(path: Path, plan: dict[str, Any], section: str, own: dict[str, Any] | None = None, **given: Any) -> Any:
    """The settings of a section: what the study gives, over the file's (`own`: one model's), over the defaults."""
    kind, reserved = SECTIONS[section]
    from_file = plan.get(section, {}) | (own or {})
    taken = sorted(from_file.keys() & set(reserved))
    if taken:
        raise UserError(f"{path}: [{section}] {taken[0]} is given by the study itself; leave it out")
    return parse_options(kind, from_file | given, f"{path}: [{section}]")


def parse_options(kind: type[settings.Config], options: dict[str, Any], where: str) -> settings.Config:
    """Settings of `kind` from named options, parsed by the same code as the command line.

    Raises:
        UserError: an unknown option or a value of the wrong type; `where` begins the message.
    """
    fields = [f.name for f in dataclasses.fields(kind)] + [f.name for f in dataclasses.fields(settings.LLMConfig)]  # type: ignore[arg-type]
    arguments: list[str] = []
    positional: list[str] = []
    for name, value in options.items():
        if name not in fields:
            raise UserError(f"{where} has no option {name!r}; see `cratescope <section> --help`")
        values = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
        if isinstance(value, dict):
            values = [str(part) for pair in value.items() for part in pair]
        if name in ("source", "run", "runs") or (name == "out" and kind is settings.TrainConfig):
            positional += values
        elif isinstance(value, bool):
            arguments.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            arguments += [f"--{name.replace('_', '-')}", *values]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return settings.parse(kind, [*positional, *arguments])
    except SystemExit as error:
        named = next((o for o in options if f"--{o.replace('_', '-')}" in said.getvalue()), "an option")
        value = options.get(named)
        raise UserError(f"{where} {named} = {value!r} is not a value it takes") from error
