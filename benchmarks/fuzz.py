"""Fuzz: every command is given damaged files, odd options and odd answers of a server, over a thousand in ten minutes.

Each input spoils one thing in a fresh copy of a small finished study and runs one command in a process of its own, with
a time limit. Right are: one line that refuses it (exit code 2) and leaves nothing new behind, or the same result as
that of the undamaged input; another result only where what was changed is as good an input as before (a flipped letter
of a text). Faults are tracebacks, hangs, crashes, other results in silence, values accepted that make no sense, and
refused commands that leave something new (`left`) or after which the right command fails (`claimed`).

    python benchmarks/fuzz.py                            # everything; exit code 1 on any fault
    python benchmarks/fuzz.py --only server              # one target
    python benchmarks/fuzz.py --seed 3 --only files/run.json-7    # one input again, with the whole stack trace
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# One thread each: as many inputs as cores run at once. Nothing is to be looked up on a network.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "NO_PROXY": "127.0.0.1", "NO_COLOR": "1", "COLUMNS": "300"}

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from fuzz_inputs import KEEPS, SAID, SPLITS, STAGES, STUDY, TARGETS, TRAINING, Input, good_answer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import cratescope.exchange.export
import cratescope.exchange.imports
import cratescope.exchange.openai
import cratescope.explain.judge
import cratescope.llm.local
import cratescope.llm.server

# Imported once, so that the processes made for the inputs have it all.
import cratescope.lm.evaluate
import cratescope.lm.train
import cratescope.neurons.collect
import cratescope.report.card
import cratescope.report.report
import cratescope.score.score
import cratescope.study  # noqa: F401
from cratescope import cli
from cratescope.explain.config import ExplainConfig
from cratescope.explain.explain import explain
from cratescope.llm.config import LLMConfig
from scripted import ScriptedLLM

MEMORY = 16 << 30
"""Address space of a process: a number that asks for more is a fault, and not the machine's end."""
WORDS = ("river", "house", "garden", "letter", "engine", "captain", "market", "window", "teacher", "winter")
Chance = random.Random
Json = Any


@dataclass(frozen=True)
class Options:
    """Fuzz the commands and write what was found."""

    seed: int = 0
    """Draws what is spoiled and how."""
    minutes: float = 8.5
    """Start nothing after so long; targets take turns, so each has had its share. Ends before ten minutes."""
    only: str = ""
    """One target (`text`, `study`, `records`, `pt`, `files`, `options`, `server`), or one input as `target/name`."""
    limit: float = 60
    """Seconds after which an input hangs."""
    jobs: int = os.cpu_count() or 1
    """Inputs at once."""
    out: Path = Path("fuzz.json")
    """What was found, as JSON."""


def sentences(chance: Chance, number: int) -> str:
    return " ".join(f"The {chance.choice(WORDS)} saw 7 {chance.choice(WORDS)}s." for _ in range(number))


def make_world() -> None:
    """Every file that the commands read, made by the commands themselves in the working directory."""
    chance = random.Random(0)
    texts = [f"Document {number}. {sentences(chance, 12)}" for number in range(60)]
    Path("text").mkdir()
    for number, text in enumerate(texts):
        Path(f"text/{number:03}.txt").write_text(text)
    must(f"prepare text --out data {SPLITS}")
    must(f"train run {TRAINING}")
    shutil.copytree("run", "part", ignore=shutil.ignore_patterns("model", "run.json", "checkpoint-2"))
    shutil.rmtree("run/checkpoints")  # only `resume` reads them, and every input copies all there is
    must("evaluate run --crops 2 --device cpu")
    must(STAGES["collect"][0])
    must(STAGES["sae"][0])
    tokenizer = PreTrainedTokenizerFast.from_pretrained("data/tokenizer")
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=4096)
    torch.manual_seed(0)
    GPT2LMHeadModel(shape).save_pretrained("llm")
    tokenizer.save_pretrained("llm")
    config = ExplainConfig(Path("run"), neurons=2, llm=LLMConfig(llm="scripted"))
    answers = itertools.cycle(WORDS)
    explain(config, ScriptedLLM(lambda _prompt: f" words like {next(answers)}"))
    for stage in ("simulate", "judge", "score", "export"):
        must(STAGES[stage][0])
    for index in range(3):
        Path("records/0").mkdir(parents=True, exist_ok=True)
        shutil.copy(f"new/0/{index}.json", f"records/0/{index}.json")
    shutil.rmtree("new")
    must("import records --out imported")
    config = ExplainConfig(Path("imported"), neurons=2, llm=LLMConfig(llm="scripted"))
    explain(config, ScriptedLLM(lambda _prompt: f" words like {next(answers)}"))
    must("convert run/model crate.pt")
    Path("study.toml").write_text(STUDY)


def must(line: str) -> None:
    kind, said = command(shlex.split(line))
    if kind != "ok":
        raise RuntimeError(f"{line}: {said}")


def command(arguments: list[str]) -> tuple[str, str]:
    """Run a command as the shell would: `ok` and what it printed, `refused` and why, or `traceback` and where."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run_and_exit(arguments)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/cratescope/" in f.filename]
        where = f"{ours[-1].filename.rpartition('cratescope/')[2]}:{ours[-1].lineno}" if ours else "?"
        print(traceback.format_exc(), file=sys.__stderr__)
        return "traceback", f"{where} {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if "Traceback" in err.getvalue():
        print(err.getvalue(), file=sys.__stderr__)
        return "traceback", f"on stderr: {err.getvalue().strip().splitlines()[-1][:160]}"
    if code == 0:
        return "ok", out.getvalue() + "\0" + err.getvalue()
    lines = [line for line in err.getvalue().splitlines() if line.startswith("cratescope: ")]
    return "refused", " ".join(lines) or err.getvalue()[-300:]


# What a command has made, apart from times and what only says of what it was made.
VOLATILE = {
    "seconds",
    "versions",
    "made_from",
    "made_with",
    "sha256",
    "manifest_sha256",
    "settings",
    "utilisation",
    "tokens_per_second",
}
SETTINGS = re.compile("<details[^>]*><summary>Settings and versions</summary>.*?</details>", re.DOTALL)
"""The same in a page."""
UNREAD = re.compile(
    r".*(/manifest\.json|/report\.json|/\.verified\.json|\.lock|/checkpoints/.*)|new/report/.*(\.html|\.svg|\.png)"
)


def snapshot() -> dict[str, bytes]:
    """Every file and folder in the working directory, and a hash of what is in it."""
    found = {}
    for folder, _, names in os.walk("."):
        found[folder] = b""
        for name in names:
            path = Path(folder, name)
            regular = path.is_file() and not path.is_symlink()
            found[str(path)] = hashlib.blake2b(path.read_bytes()).digest() if regular else b"other"
    return found


def made(before: dict[str, bytes], said: str) -> dict[str, str]:
    """What a command printed, and the contents of the files it has written."""
    found = {"stdout": said.partition("\0")[0]}
    for name, digest in snapshot().items():
        path = Path(name)
        if path.is_file() and before.get(name) != digest and not UNREAD.fullmatch(name):
            found[name] = hashlib.blake2b(repr(content(path)).encode()).hexdigest()
    return found


def content(path: Path) -> Any:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [steady(json.loads(line)) for line in lines]
    if path.suffix == ".html":
        return SETTINGS.sub("", path.read_text())
    return path.read_bytes()


def steady(value: Json) -> Json:
    if isinstance(value, dict):
        return {name: steady(one) for name, one in sorted(value.items()) if name not in VOLATILE}
    return [steady(one) for one in value] if isinstance(value, list) else value


# One input, in a process of its own.


def attempt(one: Input, world: Path, seed: int, good: dict[str, str] | None) -> dict[str, Any]:
    """What became of the input; `good` is what the command makes of undamaged files, None to find that out."""
    shutil.copytree(world, ".", dirs_exist_ok=True, symlinks=True)
    line, removed = STAGES[one.stage]
    for name in removed:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    whole = snapshot()
    may_differ = one.spoil(random.Random(f"{seed} {one.path}"))
    spoiled = snapshot()
    arguments = filled(line)
    kind, said = command(override(arguments, one.more))
    if good is None:
        return {"kind": kind, "said": said, "made": made(spoiled, said)}
    if kind == "ok":
        kind, said = verdict(made(spoiled, said), said, good, may_differ)
    elif kind == "refused" and (changed := written(spoiled)):
        mend(world, whole, spoiled)
        SAID.answer = good_answer
        again, why = command(arguments)
        if again != "ok" or not (may_differ or made(whole, why) == good):
            kind, said = "claimed", f"{said} AFTERWARDS {again}: {why}"
        elif not one.stage.startswith(KEEPS):
            kind, said = "left", f"{changed[0]} and {len(changed) - 1} more: {said}"
    # The working directory is the only thing in the folder that holds it, and so on three levels up.
    strays = [name for up in ("..", "../..", "../../..") for name in os.listdir(up) if name not in ("a", "b", "c")]
    if strays and "../x" not in one.more:
        kind, said = "escaped", f"{strays[0]}: {said}"
    return {"kind": kind, "said": said[:1000]}


def written(before: dict[str, bytes]) -> list[str]:
    """The files and folders that are new, changed or gone, apart from locks and what is remembered of sums."""
    found = {name for name, _ in before.items() ^ snapshot().items()}
    return sorted(name for name in found if not name.endswith((".lock", ".verified.json")))


def verdict(found: dict[str, str], said: str, good: dict[str, str], may_differ: bool | None) -> tuple[str, str]:
    """What to call the end of a command that did not refuse its input."""
    if may_differ is None:
        return "accepted", said
    if found == good:
        return "same", said
    names = [name for name in sorted(found.keys() | good.keys()) if found.get(name) != good.get(name)]
    if may_differ:
        return "other", f"{len(names)} results differ: {', '.join(names[:4])}: {said}"
    kind = "warned" if "warning" in said.partition("\0")[2] else "silent"
    return kind, f"{len(names)} results differ: {', '.join(names[:4])}"


def filled(line: str) -> list[str]:
    table = next(Path("run/explanations").rglob("layer-00.parquet"), None)
    neuron = 0
    if table and "{neuron}" in line:
        with contextlib.suppress(pa.ArrowException):  # it may be the damaged one
            neuron = pq.read_table(table, columns=["index"]).column("index")[0].as_py()
    port = SAID.start() if "{port}" in line else 0
    return shlex.split(line.format(neuron=neuron, port=port))


def override(arguments: list[str], more: tuple[str, ...]) -> list[str]:
    """`more` is a flag and its values, which take the place of those there are; or (`#n`, value) for a positional."""
    if not more:
        return arguments
    if more[0].startswith("#"):
        place = int(more[0][1:])
        return [*arguments[:place], more[1], *arguments[place + 1 :]]
    flag = more[0].partition("=")[0]
    if flag in arguments:
        start = arguments.index(flag)
        end = next((n for n in range(start + 1, len(arguments)) if arguments[n].startswith("--")), len(arguments))
        arguments = arguments[:start] + arguments[end:]
    return [*arguments, *more]


def mend(world: Path, whole: dict[str, bytes], spoiled: dict[str, bytes]) -> None:
    """Put back what was spoiled, and nothing else."""
    for name in sorted(whole.keys() ^ spoiled.keys() | {n for n in whole if whole[n] != spoiled.get(n)}, reverse=True):
        path = Path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in sorted(whole):
        if not Path(name).exists():
            Path(name).mkdir() if (world / name).is_dir() else shutil.copy(world / name, name)


def in_process(here: Path, work: Callable[[], Any]) -> None:
    """The life of a process: `work` in the folder `here`, and its result beside it."""
    os.setpgid(0, 0)
    with open(f"{here}.log", "w") as log, open(f"{here}.in", "w+") as answers:
        answers.write("y\n" * 9)  # whoever asks for leave to run a stranger's code gets it
        answers.seek(0)
        for number, file in enumerate((answers, log, log)):
            os.dup2(file.fileno(), number)
    sys.stdin = open(0)  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["CRATESCOPE_CACHE"] = f"{here}.cache"
    # A folder some levels down, so that what climbs out of it is seen.
    (here / "a/b/c").mkdir(parents=True)
    os.chdir(here / "a/b/c")
    try:
        result = work()
    except BaseException:
        result = {"kind": "harness", "said": " ".join(traceback.format_exc().split())[-300:]}
    Path(f"{here}.json").write_text(json.dumps(result, default=repr))
    sys.stdout.flush()
    os._exit(0)


@dataclass(eq=False)
class Child:
    """A process under way."""

    process: BaseProcess
    here: Path
    limit: float
    started: float

    @classmethod
    def start(cls, here: Path, limit: float, work: Callable[[], Any]) -> Child:
        process = multiprocessing.get_context("fork").Process(target=in_process, args=(here, work))
        process.start()
        return cls(process, here, limit, time.monotonic())

    def result(self) -> dict[str, Any] | None:
        """What became of it; None while it may still end."""
        if self.process.is_alive():
            if self.seconds() < self.limit:
                return None
            found = {"kind": "hang", "said": "no end within the time limit"}
        else:
            path = Path(f"{self.here}.json")
            said = f"ended by exit code {self.process.exitcode}: {last_words(self.here)}"
            found = json.loads(path.read_text()) if path.exists() else {"kind": "crash", "said": said}
        self.end()
        return found

    def end(self) -> None:
        """End it and whatever it has started."""
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()

    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.started

    def tidy(self) -> None:
        """Remove its files."""
        for left in self.here.parent.glob(f"{self.here.name}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def last_words(here: Path) -> str:
    return " ".join(Path(f"{here}.log").read_text(errors="replace").splitlines()[-2:])[-200:]


FAULTS = ("traceback", "hang", "crash", "silent", "accepted", "left", "claimed", "escaped", "harness")


# The run.


def chosen(options: Options) -> list[Input]:
    target, _, name = options.only.partition("/")
    if target and target not in TARGETS:
        raise SystemExit(f"--only {target}: no such target; there are {', '.join(TARGETS)}")
    turns: list[list[Input]] = []
    for make in (make for key, make in TARGETS.items() if target in ("", key)):
        found = list({one.path: one for one in make() if name in ("", one.name)}.values())
        random.Random(options.seed).shuffle(found)
        turns.append(found)
    inputs = [one for turn in itertools.zip_longest(*turns) for one in turn if one]
    if not inputs:
        raise SystemExit(f"--only {options.only}: no such input")
    return inputs


def alone(here: Path, limit: float, work: Callable[[], Any]) -> dict[str, Any]:
    """Run one process and wait for it."""
    child = Child.start(here, limit, work)
    while (found := child.result()) is None:
        wait([child.process.sentinel], timeout=0.5)
    return found


def good_results(folder: Path, world: Path, stages: set[str]) -> dict[str, dict[str, str]]:
    """What every command does with undamaged files."""
    found = {}
    for stage in sorted(stages):
        undamaged = Input("good", stage, stage, lambda _: bool(setattr(SAID, "answer", good_answer)))
        one = alone(folder / f"good-{stage}", 300, lambda one=undamaged: attempt(one, world, 0, None))
        if one["kind"] != "ok":
            raise SystemExit(f"the undamaged {stage} itself fails: {one['said']}")
        found[stage] = one["made"]
    return found


def fuzz(options: Options, inputs: list[Input], folder: Path) -> list[dict[str, Any]]:
    """Try the inputs, several at once, until all are done or the time is over."""
    world, started = folder / "world/a/b/c", time.monotonic()
    with Console(stderr=True).status("making the files to damage"):
        if (one := alone(folder / "world", 300, lambda: make_world() or {"kind": "ok"}))["kind"] != "ok":
            raise SystemExit(f"the files to damage could not be made: {one['said']}")
        good = good_results(folder, world, {one.stage for one in inputs})
    rows: list[dict[str, Any]] = []
    waiting, running = iter(inputs), dict[Child, Input]()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, contextlib.ExitStack() as ending:
        ending.callback(lambda: [child.end() for child in running])
        task = progress.add_task("fuzz", total=len(inputs))
        while True:
            time_left = time.monotonic() - started < 60 * options.minutes
            while time_left and len(running) < options.jobs and (one := next(waiting, None)):
                here = folder / f"{one.target}-{time.monotonic_ns()}"
                work = lambda one=one: attempt(one, world, options.seed, good[one.stage])  # noqa: E731
                running[Child.start(here, options.limit, work)] = one
            if not running:
                return rows
            wait([child.process.sentinel for child in running], timeout=0.5)
            for child, one in [*running.items()]:
                if (result := child.result()) is not None:
                    row = {"target": one.target, "input": one.path, "stage": one.stage}
                    rows.append({**row, "seconds": round(child.seconds(), 2), **result})
                    if result["kind"] in FAULTS:
                        progress.console.print(result["kind"], one.path, result["said"], markup=False, soft_wrap=True)
                    rows[-1]["log"] = Path(f"{child.here}.log").read_text(errors="replace")
                    child.tidy()
                    del running[child]
                    faults = sum(row["kind"] in FAULTS for row in rows)
                    progress.update(task, advance=1, description=f"fuzz, {faults} faults")


def tell(options: Options, rows: list[dict[str, Any]], planned: int, seconds: float) -> None:
    """Print the faults, like ones once, and the table; write everything as JSON."""
    console = Console(soft_wrap=True, markup=False, highlight=False)
    faults = [row for row in rows if row["kind"] in FAULTS]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in faults:
        where = (
            row["said"].partition(": ")[0]
            if row["kind"] == "traceback"
            else f"{row['stage']} {row['input'].partition('-')[0]}"
        )
        groups.setdefault((row["kind"], where), []).append(row)
    for (kind, _), like in sorted(groups.items(), key=lambda item: item[0]):
        console.print(f"{kind} x {len(like)}: {like[0]['said'][:240]}")
        command = ["python", "benchmarks/fuzz.py", "--seed", str(options.seed), "--only", like[0]["input"]]
        console.print("   ", shlex.join(command))
    for row in faults if "/" in options.only else ():
        console.print(row["log"], row["said"])
    table = Table("target", "inputs", "refused", "read as before", "other input", *FAULTS)
    counts = {name: Counter(row["kind"] for row in rows if row["target"] == name) for name in TARGETS}
    counts = {name: count for name, count in counts.items() if count}
    for name, count in (counts | {"all": sum(counts.values(), Counter())}).items():
        other = count["other"] + count["warned"]
        cells = (count.total(), count["refused"], count["same"], other, *(count[kind] for kind in FAULTS))
        table.add_row(name, *map(str, cells))
    console.print(table)
    said = f"seed {options.seed}: {len(rows):,} of {planned:,} inputs in {seconds:.0f} s"
    console.print(f"{said}; {len(faults)} faults, {len(groups)} of them unlike")
    summary = {"seed": options.seed, "planned": planned, "tried": len(rows), "seconds": round(seconds, 1)}
    summary |= {"targets": counts, "inputs": [{k: v for k, v in row.items() if k != "log"} for row in rows]}
    options.out.write_text(json.dumps(summary, indent=2) + "\n")


def main() -> None:
    options = tyro.cli(Options)
    inputs, started = chosen(options), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        rows = fuzz(options, inputs, Path(folder).resolve())
    tell(options, rows, len(inputs), time.monotonic() - started)
    sys.exit(any(row["kind"] in FAULTS for row in rows))


if __name__ == "__main__":
    main()
