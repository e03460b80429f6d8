"""The command line: one short function per subcommand. Heavy imports stay inside them, so --help is instant."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from cratescope import config as settings
from cratescope.hardware import keep_freed_memory, processes, rank
from cratescope.run import DISK_FULL, Stopped, UserError, unusable


def prepare(config: settings.PrepareConfig) -> str:
    from rich.console import Console

    from cratescope.lm.data import prepare

    data = prepare(config, Console(stderr=True))
    return "\n".join(
        f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens"
        for name, split in data.manifest["splits"].items()
    )


def train(config: settings.TrainConfig) -> str:
    from cratescope.lm.train import train

    return str(train(config).model)


def evaluate(config: settings.EvaluateConfig) -> str:
    from cratescope.lm.evaluate import evaluate

    result = evaluate(config)
    lines = [_loss("validation", result)]
    lines += [_loss(name, result["sets"][name]) for name in dict.fromkeys(config.on) if name != "validation"]
    for name in config.task_names():
        for task, metrics in result["tasks"][name]["results"].items():
            lines += [f"{task} {metric} {_plus_minus(*row.values())}" for metric, row in metrics.items()]
    return "\n".join(lines)


def _loss(name: str, row: dict[str, Any]) -> str:
    line = f"{name} loss {_plus_minus(row['loss'], row['standard_error'])} nats per token, "
    line += f"{row['bits_per_byte']:.3f} bits per byte"
    if "unigram_entropy" in row:
        line += f"; unigram entropy {row['unigram_entropy']:.4f}"
    if word := row.get("last_word"):
        line += f"; last word {_percent(word['accuracy'], word['accuracy_standard_error'])} % right"
    return line


def collect(config: settings.CollectConfig) -> str:
    from cratescope.neurons.collect import collect

    return str(collect(config))


def explain(config: settings.ExplainConfig) -> str:
    from cratescope.neurons.explain import explain

    return "\n".join(map(str, explain(config)))


def simulate(config: settings.SimulateConfig) -> str:
    from cratescope.neurons.simulate import simulate

    return "\n".join(map(str, simulate(config)))


def judge(config: settings.JudgeConfig) -> str:
    from cratescope.neurons.judge import judge

    return "\n".join(map(str, judge(config)))


def score(config: settings.ScoreConfig) -> str:
    from cratescope.neurons.records import read_scores
    from cratescope.neurons.score import score
    from cratescope.results.scores import Scores
    from cratescope.run import read_json

    folder = score(config)
    scores = Scores(read_scores(folder / "scores.jsonl"))
    lines = [_score_line(scores, name) for name in scores.protocols]
    verdicts = read_json(folder / "scores.json")["sanity"]
    for passes in (True, False):
        names = [f"{row['sample']} {row['measure']}" for row in verdicts if row["passes"] == passes]
        if names:
            lines.append(f"{'pass' if passes else 'fail'} the missing-label and extra-label tests: {', '.join(names)}")
    return "\n".join(lines)


def _score_line(scores: Any, protocol: str) -> str:
    """Format a protocol's own measure x100 and its gain over every control."""
    mean, measure = scores.mean(protocol), scores.measures(protocol)[0]
    gains = {control: scores.mean(protocol, over=control) for control in scores.controls(protocol)}
    listed = [f"{control} {_percent(gain.mean, gain.standard_error)}" for control, gain in gains.items()]
    line = f"{protocol}: {measure} x 100 {_percent(mean.mean, mean.standard_error)}"
    return line + (f"; gain over {', '.join(listed)}" if listed else "")


def report(config: settings.ReportConfig) -> str:
    from cratescope.report.report import report

    return str(report(config))


def export(config: settings.ExportConfig) -> str:
    from cratescope.neurons.exchange import export

    return str(export(config))


def import_(config: settings.ImportConfig) -> str:
    from cratescope.neurons.exchange import import_records

    return str(import_records(config))


def show(config: settings.ShowConfig) -> str:
    from rich.console import Console

    from cratescope.report.card import neuron_card

    console = Console()
    with console.capture() as shown:
        console.print(neuron_card(config))
    return shown.get().rstrip("\n")


def convert(config: settings.ConvertConfig) -> str:
    from cratescope.models.convert import convert

    return str(convert(config.source, config.out))


def study(config: settings.StudyConfig) -> str:
    from cratescope.study import study

    return str(study(config))


def _plus_minus(*numbers: float | None) -> str:
    return " +- ".join("-" if number is None else f"{number:.4f}" for number in numbers)


def _percent(value: float | None, error: float | None) -> str:
    return " +- ".join("-" if number is None else f"{100 * number:.1f}" for number in (value, error))


COMMANDS: dict[str, tuple[Callable[[Any], str], type]] = {
    "prepare": (prepare, settings.PrepareConfig),
    "train": (train, settings.TrainConfig),
    "evaluate": (evaluate, settings.EvaluateConfig),
    "collect": (collect, settings.CollectConfig),
    "explain": (explain, settings.ExplainConfig),
    "simulate": (simulate, settings.SimulateConfig),
    "judge": (judge, settings.JudgeConfig),
    "score": (score, settings.ScoreConfig),
    "show": (show, settings.ShowConfig),
    "report": (report, settings.ReportConfig),
    "study": (study, settings.StudyConfig),
    "export": (export, settings.ExportConfig),
    "import": (import_, settings.ImportConfig),
    "convert": (convert, settings.ConvertConfig),
}


def overview() -> str:
    """The text of `cratescope --help`."""
    lines = [f"  {name:10} {(kind.__doc__ or '').splitlines()[0]}" for name, (_, kind) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cratescope COMMAND [OPTIONS]",
            "",
            "Train CRATE language models and GPT-2 twins, then explain and score their neurons with LLMs.",
            "",
            *lines,
            "",
            "`cratescope COMMAND --help` explains the options of a command. Every command skips finished work, so",
            "after an interruption the same command resumes.",
        ]
    )


def run(arguments: list[str]) -> str:
    """Parse the command line, run the subcommand and return its output.

    Raises:
        UserError: no such subcommand, or whatever the subcommand refuses.
    """
    name, rest = (arguments or ["--help"])[0], arguments[1:]
    if name in ("--help", "-h"):
        return overview()
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    command, kind = COMMANDS[name]
    if processes() > 1 and name != "train" and not hasattr(kind, "worker"):
        raise UserError(f"{name} runs in one process; start it without torchrun or accelerate")
    config: Any = settings.parse(kind, rest, prog=f"cratescope {name}")
    _set_up_process()
    if getattr(config, "ray", 0):
        from cratescope.neurons.spread import spread

        return spread(command, config)
    return command(config)


def _set_up_process() -> None:
    """Change process-wide settings, which a program may do and a library may not."""
    from transformers.utils import logging

    # The library's progress bars, for files that load instantly, would break ours.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    keep_freed_memory()


def main() -> None:
    """Entry point of the console script."""
    run_and_exit(sys.argv[1:])


def run_and_exit(arguments: list[str]) -> None:
    """Print results to stdout. Bad input, or a path the system refuses, gives one line on stderr and exit code 2."""
    _print_any_text()
    try:
        said = run(arguments)
        if rank() == 0:
            sys.stdout.write(said + "\n")
    except UserError as error:
        _fail(str(error))
    except Stopped as stop:
        _fail(str(stop), code=stop.code)
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes where it stopped", code=130)
    except Exception as error:
        if isinstance(error, OSError) and (refused := unusable(error)):
            _fail(refused)
        if not _disk_full(error):
            raise
        where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        _fail(f"disk full{where}; finished files are complete, so free some space and rerun the same command")


def _print_any_text() -> None:
    """Print a question mark for characters the terminal's encoding lacks, unless its error handler is already set."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


# Libraries that write in native code report a full disk only in words.
FULL = ("No space left on device", "os error 28", "PytorchStreamWriter failed", "unexpected pos")


def _disk_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in DISK_FULL or any(words in str(error) for words in FULL)


def _fail(message: str, code: int = 2) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine: the problem may be on one of them only
        sys.stderr.write(f"cratescope: {' '.join(message.split())}\n")
    sys.exit(code)
