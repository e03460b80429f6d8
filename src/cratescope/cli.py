"""The command line: output, errors and exit codes. Heavy imports stay inside functions, so that --help is instant."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

from cratescope.errors import DISK_FULL, Stopped, UserError, unusable
from cratescope.hardware import keep_freed_memory
from cratescope.options import parse
from cratescope.stages import STAGES
from cratescope.workers import processes, rank, run_on_ray


def _prepared(_config: Any, data: Any) -> str:
    splits = data.manifest["splits"].items()
    return "\n".join(f"{name}: {one['documents']:,} documents, {one['tokens']:,} tokens" for name, one in splits)


def _evaluated(config: Any, result: dict[str, Any]) -> str:
    lines = [_loss("validation", result)]
    lines += [_loss(name, result["sets"][name]) for name in dict.fromkeys(config.on) if name != "validation"]
    for name in config.task_names():
        for task, metrics in result["tasks"][name]["results"].items():
            lines += [f"{task} {metric} {_plus_minus(*row.values())}" for metric, row in metrics.items()]
    lines += [_coder(name, row) for name in config.sae for row in result["saes"][name]]
    return "\n".join(lines)


def _coder(name: str, row: dict[str, Any]) -> str:
    """Format what was measured of one layer's sparse autoencoder."""
    shown = ("l0", "explained_variance", "loss_recovered_zero", "loss_recovered_mean", "kl_recovered_mean")
    listed = [f"{key.replace('_', ' ')} {_plus_minus(row[key], row[f'{key}_error'])}" for key in shown]
    return f"sae/{name} layer {row['layer']}: {', '.join(listed)}, dead {100 * row['dead']:.1f} %"


def _loss(name: str, row: dict[str, Any]) -> str:
    line = f"{name} loss {_plus_minus(row['loss'], row['standard_error'])} nats per token, "
    line += f"{row['bits_per_byte']:.3f} bits per byte"
    if "unigram_entropy" in row:
        line += f"; unigram entropy {row['unigram_entropy']:.4f}"
    if word := row.get("last_word"):
        line += f"; last word {_percent(word['accuracy'], word['accuracy_standard_error'])} % right"
    return line


def _scored(_config: Any, folder: Path) -> str:
    from cratescope.files import read_json
    from cratescope.results.scores import Scores

    scores = Scores.read(folder)
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


def _shown(_config: Any, card: Any) -> str:
    from rich.console import Console

    console = Console()
    with console.capture() as shown:
        console.print(card)
    return shown.get().rstrip("\n")


def _steered(config: Any, found: Any) -> str:
    """Format what `steer` has found: the folder of a sweep, the curves of one unit, or text and predictions."""
    if config.sweep:
        return _swept(config, found) if config.neuron else str(found)
    return _continued(config, found)


def _swept(config: Any, found: Any) -> str:
    """Format the curves of one unit, its own and its controls'."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from cratescope.report.text import number, visible

    table = Table(box=None, header_style="bold")
    for name in ("", "x max", "KL", "loss", "logits", "mass %", "aims %", "rate %", "text"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for one in found.points:
        numbers = [number(one.kl, 3, 1), *(number(value, 2, 1, sign=True) for value in (one.loss, one.logit))]
        numbers += [number(value, 1) for value in (one.mass, one.aim_mass, one.rate)]
        table.add_row(one.kind, f"{one.strength:g}", *numbers, number(one.nats, 2, 1))
    plain = found.points[0]
    before = f"without edit: mass {number(plain.mass_plain)} %, rate {number(plain.rate_plain)} %, "
    before += f"text {number(plain.nats_plain, 2, 1)} nats"
    targets = Text("targets: " + "  ".join(map(visible, found.targets)))
    return "\n".join([_shown(config, Group(targets, table)), before, *map(str, found.files)])


def _continued(config: Any, found: Any) -> str:
    """Format text and predictions, steered beside plain."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from cratescope.report.text import number, visible

    texts = Table(expand=True)
    for name in ("plain", "steered"):
        texts.add_column(name, ratio=1, overflow="fold")
    texts.add_row(*(Text("\n".join(map(visible, text.split("\n")))) for text in (found.plain, found.steered)))
    tokens = Table(title="logits after the prompt", title_justify="left")
    for name in ("rises", "by", "probability", "falls", "by", "probability"):
        tokens.add_column(name, justify="left" if name in ("rises", "falls") else "right", no_wrap=True)
    for pair in zip(found.rises, found.falls, strict=True):
        cells = [
            (visible(one.text), number(one.change, 2, 1, sign=True), f"{one.plain:.2%} → {one.steered:.2%}")
            for one in pair
        ]
        tokens.add_row(*(Text(cell) for row in cells for cell in row))
    line = (
        f"KL(steered || plain): {found.kl_prompt:.4f} nats after the prompt, {found.kl_generated:.4f} on average after "
    )
    shown = _shown(config, Group(Text(visible(found.prompt), "bold"), texts, tokens))
    return f"{shown}\n{line}{_n(found.generated)}"


def _n(tokens: int) -> str:
    return "the generated token" if tokens == 1 else f"the {tokens} generated tokens"


def _plus_minus(*numbers: float | None) -> str:
    return " +- ".join("-" if number is None else f"{number:.4f}" for number in numbers)


def _percent(value: float | None, error: float | None) -> str:
    return " +- ".join("-" if number is None else f"{100 * number:.1f}" for number in (value, error))


SAID: dict[str, Callable[[Any, Any], str]] = {
    "prepare": _prepared,
    "train": lambda _config, run: str(run.model),
    "evaluate": _evaluated,
    "score": _scored,
    "show": _shown,
    "steer": _steered,
}
"""Output of a stage from its settings and result; other stages print the result, one or several paths."""


def _do(name: str, config: Any) -> str:
    """Run a stage and return its output."""
    result = STAGES[name].load()(config)
    if name in SAID:
        return SAID[name](config, result)
    return "\n".join(map(str, result)) if isinstance(result, list) else str(result)


def overview() -> str:
    """The text of `cratescope --help`."""
    lines = [f"  {name:10} {stage.line}" for name, stage in STAGES.items()]
    before = "Train CRATE language models and GPT-2 twins, then explain and score their neurons with LLMs."
    after = "`cratescope COMMAND --help` explains the options of a command. Every command skips finished work, so\n"
    after += "after an interruption the same command resumes."
    return "\n".join(["usage: cratescope COMMAND [OPTIONS]", "", before, "", *lines, "", after])


def run(arguments: list[str]) -> str:
    """Parse the command line, run the subcommand and return its output. Raises UserError for whatever is refused."""
    name, rest = (arguments or ["--help"])[0], arguments[1:]
    if name in ("--help", "-h"):
        return overview()
    if name not in STAGES:
        raise UserError(f"no command {name!r}; there are {', '.join(STAGES)}")
    kind = STAGES[name].config
    if processes() > 1 and name != "train" and not hasattr(kind, "worker"):
        raise UserError(f"{name} runs in one process; start it without torchrun or accelerate")
    config: Any = parse(kind, rest, prog=f"cratescope {name}")
    _set_up_process()
    return run_on_ray(partial(_do, name), config) if getattr(config, "ray", 0) else _do(name, config)


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
        _run_and_exit(arguments)
    except BrokenPipeError:
        if not (broken := [stream for stream in (sys.stdout, sys.stderr) if stream and _nobody_reads(stream)]):
            raise  # another pipe than ours
        # Nobody reads on, as after `| head -1`; Python would complain when it flushes once more at its end.
        for stream in broken:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _nobody_reads(stream: IO[str]) -> bool:
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _run_and_exit(arguments: list[str]) -> None:
    try:
        try:
            said = run(arguments)
            if rank() == 0 and sys.stdout:  # there is none where the shell has closed it
                sys.stdout.write(said + "\n")
        finally:
            if sys.stdout:
                sys.stdout.flush()  # also what --help says
    except UserError as error:
        _fail(str(error))
    except Stopped as stop:
        _fail(str(stop), code=stop.code)
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes where it stopped", code=130)
    except Exception as error:
        if isinstance(error, OSError) and (refused := unusable(error)):
            _fail(refused)
        if getattr(error, "errno", None) not in DISK_FULL and not any(words in str(error) for words in FULL):
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


def _fail(message: str, code: int = 2) -> NoReturn:
    # Once per machine, since the problem may be on one of them only.
    if sys.stderr and os.environ.get("LOCAL_RANK", "0") == "0":
        # A stranger's file name or answer must not steer the terminal.
        said = re.sub("[\x00-\x1f\x7f-\x9f]", "?", " ".join(message.split()))
        sys.stderr.write(f"cratescope: {said}\n")
    sys.exit(code)
