"""What the fuzz tries (`fuzz.py` runs it): the commands, ways to spoil files, and one function a target.

A target yields inputs. An input's `spoil` works on a fresh copy of the files of `fuzz.make_world`, which is the working
directory, and says what may become of the command: True, another result is right, since what was changed is as good as
it was; False, the same result or a refusal; None, a refusal.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import math
import os
import random
import shutil
import socketserver
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard

from cratescope.llm import server as client
from cratescope.llm.config import LLMConfig
from cratescope.stages import STAGES as SUBCOMMANDS

Chance = random.Random
Json = Any
Spoil = Callable[[Chance], bool | None]


@dataclass(frozen=True)
class Input:
    """One try. `spoil` damages the copy of the world that is the working directory, and may start the server.

    It returns whether another result is right, or None when the command has to be refused.
    """

    target: str
    name: str
    stage: str
    spoil: Spoil
    more: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.target}/{self.name}"


# The commands that are tried, on the files of `make_world`, and what is deleted first so that they have work to do.
TRAINING = (
    "--data data --preset crate-1l --context 32 --batch-tokens 64 --micro-batch 2 --steps 2 --warmup-steps 1"
    " --log-every 1 --save-every 1 --validate-every 1 --validation-crops 2 --device cpu --dtype float32"
)
SPLITS = "--tokenizer bpe:300 --validation 0.2 --heldout 0.3"
SERVER = "--llm http://127.0.0.1:{port}/v1 --llm-model m --llm-timeout 1 --llm-concurrency 2"
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "prepare": (f"prepare text --out new {SPLITS}", ()),
    "train": (f"train new {TRAINING}", ()),
    "resume": (f"train part {TRAINING}", ()),
    "evaluate": ("evaluate run --crops 2 --device cpu", ("run/evaluation.json",)),
    "evaluate-on": ("evaluate run --crops 2 --device cpu --on text", ("run/evaluation.json",)),
    "collect": (
        "collect run --excerpts 8 --context 32 --top 3 --random 3 --batch-size 4 --part 4 --tokens 50 --device cpu",
        ("run/records",),
    ),
    "sae": (
        "sae run --tokens 64 --batch 32 --buffer 64 --expansion 1 --k 4 --batch-size 2 --device cpu --dtype float32",
        ("run/saes",),
    ),
    "collect-sae": (
        "collect run --site sae/sae --excerpts 8 --context 32 --top 3 --random 3 --batch-size 4 --part 4 --device cpu",
        (),
    ),
    "explain": ("explain run --neurons 2 --llm llm --llm-device cpu", ()),
    "simulate": ("simulate run --explainer scripted --llm llm --llm-device cpu", ("run/simulations",)),
    "judge": ("judge run --explainer scripted --llm llm --llm-device cpu", ("run/judgements",)),
    "score": ("score run --explainer scripted", ("run/scores",)),
    "show": ("show run 0 {neuron} --explainer scripted", ()),
    "report": ("report run --out new --explainer scripted --cards 1", ()),
    "export": ("export run --out new", ()),
    "import": ("import records --out new", ()),
    "convert": ("convert crate.pt new", ()),
    "convert-back": ("convert run/model new.pt", ()),
    "study": ("study study.toml --out new", ()),
    "terms": ("terms", ()),
    "zoo": ("zoo", ()),
    "serve-chat": (f"explain imported --llm-chat {SERVER}", ()),
    "serve-text": (f"explain imported {SERVER}", ()),
    "serve-simulate": (
        f"simulate imported --explainer scripted --neurons 1 --simulator all-at-once --llm-tokenizer llm {SERVER}",
        (),
    ),
    "serve-judge": (f"judge imported --explainer scripted --neurons 1 --llm-tokenizer llm {SERVER}", ()),
}
KEEPS = ("serve-", "study", "resume", "evaluate-on")
"""Commands that keep what is finished when they are refused later on: there only what comes after is tried."""
STUDY = """
title = "a study"
[prepare]
source = "text"
tokenizer = "bpe:300"
validation = 0.2
heldout = 0.3
[train]
context = 32
batch_tokens = 64
micro_batch = 2
steps = 1
warmup_steps = 0
log_every = 1
save_every = 1
validate_every = 0
validation_crops = 2
device = "cpu"
dtype = "float32"
[[model]]
name = "small"
preset = "gpt2-1l"
crate = {}
[evaluate]
crops = 2
[collect]
excerpts = 4
top = 3
random = 3
strata = true
layers = [0]
[explain]
neurons = 2
llm = "llm"
llm_device = "cpu"
[simulate]
llm = "llm"
protocols = ["top-and-random", "random-only"]
[report]
cards = 1
primary = "top-and-random/pearson/shuffled"
"""


# Ways to spoil a file.

BYTES = ("flip", "cut", "zeros", "junk", "empty", "missing")
VALUES: tuple[Json, ...] = (
    *(None, True, -1, 0, 1.5, math.inf, math.nan, 10**400, -(10**18), "", "x", "\ud800", "../x", "[/b]", "=1+1"),
    *([], {}, [[]], {"a": 1}, [None], "9" * 5000),
)


def spoil_bytes(path: Path, how: str, chance: Chance) -> None:
    data = bytearray(path.read_bytes())
    place = chance.randrange(max(len(data), 1))
    if how == "flip" and data:
        data[place] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del data[place:]
    elif how == "zeros":
        length = chance.choice((16, 4096, len(data)))
        place = 0 if length == len(data) else place
        data[place : place + length] = bytes(min(length, len(data) - place))
    elif how == "junk":
        data[place : place + 64] = chance.randbytes(64)
    elif how == "empty":
        data.clear()
    path.unlink()
    if how != "missing":
        path.write_bytes(data)


def places(value: Json) -> list[tuple[Json, Json]]:
    """Every (container, key) below `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in [(value, key), *places(value[key])]]


def spoil_json(value: Json, chance: Chance) -> bool:
    """Change, delete or add one thing; whether the result is of the same shape, and so as good an input."""
    container, key = chance.choice(places(value))
    if chance.random() < 0.25:
        del container[key]
        return False
    new = chance.choice(VALUES)
    same = shape(new) == shape(container[key])
    container[key] = new
    return same


def shape(value: Json) -> Any:
    """Types and keys: a changed number of the same type cannot be told from a right one."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    return "number" if type(value) in (int, float) else type(value).__name__


def shape_of(path: Path) -> Any:
    """The shape of a JSON or TOML-like file, None if it is damaged, the name's kind for other files."""
    try:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [shape(json.loads(line)) for line in lines]
    except (ValueError, OSError, RecursionError):
        return None


def spoil_file(path: Path, chance: Chance, how: str) -> bool:
    """Spoil a file; whether what it holds now is as good as before, as far as its form goes."""
    if how == "json":
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        number = chance.randrange(len(lines))
        value = json.loads(lines[number])
        same = spoil_json(value, chance)
        lines[number] = json.dumps(value)
        path.write_text("\n".join(lines) + "\n")
        return same
    if how == "odd":
        old = path.read_bytes()
        new = chance.choice(
            (b"null", b"[]", b"{}", b"3", b'"x"', b"[" * 90000, b"\xef\xbb\xbf" + old, b"\xff\xfe", b"[1]")
        )
        path.write_bytes(new)
        return False
    before = shape_of(path) if path.suffix in (".json", ".jsonl") else None
    spoil_bytes(path, how, chance)
    return how == "flip" and before is not None and before == shape_of(path)


def picked(pattern: str, chance: Chance) -> Path:
    found = sorted(path for path in Path(".").glob(pattern) if path.is_file())
    return chance.choice(found)


# Targets: each yields its inputs.

READERS: dict[str, tuple[str, int]] = {
    "run/run.json": ("evaluate collect report show explain", 26),
    "run/manifest.json": ("evaluate report score", 8),
    "run/model/config.json": ("evaluate collect convert-back", 30),
    "run/model/model.safetensors": ("evaluate collect convert-back", 24),
    "run/model/tokenizer.json": ("explain show export evaluate", 20),
    "run/model/tokenizer_config.json": ("explain show export evaluate", 12),
    "run/metrics.jsonl": ("report", 16),
    "run/evaluation.json": ("report", 14),
    "run/records/*/*.parquet": ("explain simulate show score export", 30),
    "run/records/*/manifest.json": ("explain score simulate export", 14),
    "run/explanations/*/*/*/layer-*.parquet": ("simulate judge score show report", 24),
    "run/explanations/*/*/*/manifest.json": ("simulate score", 10),
    "run/simulations/*/*/*/*/layer-*.parquet": ("score report show", 24),
    "run/simulations/*/*/*/*/manifest.json": ("score", 8),
    "run/judgements/*/*/*/*/layer-*.parquet": ("score report", 18),
    "run/judgements/*/*/*/*/manifest.json": ("score", 8),
    "run/scores/*/*/*/layer-*.parquet": ("report show", 22),
    "run/scores/**/scores.json": ("report", 18),
    "run/scores/*/quality.json": ("report", 14),
    "run/saes/sae/layer-00/*": ("collect-sae", 24),
    "run/saes/sae/layer-00/cfg.json": ("collect-sae", 16),
    "part/metrics.jsonl": ("resume", 8),
    "part/manifest.json": ("resume", 8),
    "part/checkpoints/checkpoint-1/*": ("resume", 24),
    "part/checkpoints/checkpoint-1/trainer_state.json": ("resume", 8),
    "data/manifest.json": ("train evaluate collect", 24),
    "data/*.npy": ("train evaluate collect", 12),
    "data/.verified.json": ("train evaluate", 8),
    "data/tokenizer/*.json": ("train evaluate-on", 12),
    "llm/model.safetensors": ("explain simulate judge", 14),
    "llm/config.json": ("explain simulate judge", 18),
    "llm/tokenizer*.json": ("explain simulate judge", 14),
}
"""Every kind of file -> the commands that read it, and the number of inputs."""


def files() -> Iterator[Input]:
    """Damage to every kind of file that a command writes and another reads."""
    for pattern, (stages, number) in READERS.items():
        form = pattern.endswith(("json", "jsonl", "/*"))
        ways = (*BYTES, "json", "json", "json", "odd") if form else BYTES
        for index in range(number):
            stage, how = stages.split()[index % len(stages.split())], ways[index % len(ways)]
            name = f"{pattern.replace('/', ':')}-{how}-{index}-{stage}"
            yield Input("files", name, stage, spoiler(pattern, how))
    for stage in ("evaluate", "collect", "convert-back"):
        yield Input("files", f"code-in-model-{stage}", stage, lambda _: strangers_code(Path("run/model")))
    for stage in ("explain", "simulate"):
        yield Input("files", f"code-in-llm-{stage}", stage, lambda _: strangers_code(Path("llm")))


def spoiler(pattern: str, how: str) -> Spoil:
    def spoil(chance: Chance) -> bool:
        path = picked(pattern, chance)
        same = spoil_file(path, chance, "flip" if how == "json" and "json" not in path.suffix else how)
        whole = path.with_name("whole.json")
        if path.suffix == ".json" and whole.exists() and path != whole and chance.random() < 0.5:
            whole.unlink()  # as of a model from elsewhere
            return True
        # A file that is not there belongs to a stage that is not finished, and so may a log that ends earlier; a model
        # from elsewhere has no checksum.
        ends_earlier = how == "cut" and path.name == "metrics.jsonl"
        return same or how == "missing" or ends_earlier or path.parts[0] == "llm"

    return spoil


def strangers_code(folder: Path) -> None:
    """A model that wants to run its own code, which would leave a file."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {name: f"strange.{name}" for name in ("AutoConfig", "AutoModel")}}
    config["auto_map"]["AutoModelForCausalLM"] = "strange.AutoModelForCausalLM"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "whole.json").unlink(missing_ok=True)
    (folder / "strange.py").write_text(f"open({str(Path('ran').resolve())!r}, 'w')\n")


def text() -> Iterator[Input]:
    """Damaged text files of every format, encodings, and rows of other shapes."""
    for form, (index, how) in itertools.product(FORMATS, enumerate((*BYTES, "flip", "cut", "junk") * 2)):
        stage = ("prepare", "evaluate-on")[index % 2]
        yield Input("text", f"{form}-{how}-{index}", stage, spoiled_text(form, how))
    for form, (name, change) in itertools.product(("txt", "jsonl", "jsonl.gz", "jsonl.zst"), ENCODINGS.items()):
        yield Input("text", f"{form}-as-{name}", "prepare", encoded_text(form, change))
    for form, (number, row) in itertools.product(("jsonl", "jsonl.zst", "jsonl.gz"), enumerate(ROWS)):
        yield Input("text", f"{form}-row-{number}", "prepare", odd_row(form, row))
    for number, (name, _) in itertools.product(range(2), COLUMNS):
        stage = ("prepare", "evaluate-on")[number]
        yield Input("text", f"column-{name}-{stage}", stage, odd_column(name))
    for name in PLACES:
        yield Input("text", f"place-{name}", "prepare", lambda _, name=name: PLACES[name]() is not None or None)


def texts_there() -> list[str]:
    return [path.read_text() for path in sorted(Path("text").glob("*.txt"))]


def rows_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": one}) + "\n" for one in texts).encode()


def packed(data: bytes, form: str) -> bytes:
    if form.endswith("gz"):
        return gzip.compress(data, mtime=0)
    return zstandard.ZstdCompressor(write_checksum=True).compress(data) if form.endswith("zst") else data


def write_as(form: str, texts: list[str]) -> list[Path]:
    """The documents in files of that form, in place of the folder's: one file each, or a row each of one file."""
    shutil.rmtree("text")
    Path("text").mkdir()
    path = Path(f"text/all.{form}")
    if form == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif "jsonl" in form:
        path.write_bytes(packed(rows_of(texts), form))
    else:
        for number, one in enumerate(texts):
            Path(f"text/{number:03}.{form}").write_bytes(packed(one.encode(), form))
    return sorted(Path("text").iterdir())


FORMATS = ("txt", "md", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt.gz")
ENCODINGS: dict[str, Callable[[str], bytes]] = {
    **{
        name: lambda text, name=name: text.encode(name, "replace")
        for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "cp037")
    },
    "latin-1": lambda text: text.replace("river", "rivière").encode("latin-1"),
    "shift-jis": lambda text: text.replace("river", "川").encode("shift-jis"),
    "nul-bytes": lambda text: text.replace(" ", "\0").encode(),
    "returns": lambda text: text.replace("\n", "\r").encode(),
    "two-boms": lambda text: b"\xef\xbb\xbf\xef\xbb\xbf" + text.encode(),
    "cut-utf-16": lambda text: text.encode("utf-16")[:-1],
    "long-utf-8": lambda text: text.encode().replace(b"river", b"\xf8\x88\x80\x80\x80\xc0\xaf\xed\xa0\x80"),
}
ROWS = (
    *(b"null", b"3", b"[]", b'"text"', b"{}", b'{"text": null}', b'{"text": 3}', b'{"text": ["a"]}', b"{'text': 'a'}"),
    *(b'{"text": {"a": 1}}', b'{"text": true}', b'{"Text": "a"}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"\0"),
    *(b'{"text": "a", "n": ' + b"9" * 5000 + b"}", b'{"n": ' + b"[" * 90000, b'{"text": "a"', b'{"text": "a"}}'),
    *(b'{"text": "a"}{"text": "b"}', b'{"text": NaN}', b'{"text": "a", "text": 3}', b'{"text": "a\nb"}', b"\xff\xfe"),
)
COLUMNS: tuple[tuple[str, Callable[[], pa.Table]], ...] = (
    ("dictionary", lambda: pa.table({"text": pa.array(texts_there()).dictionary_encode()})),
    ("binary", lambda: pa.table({"text": pa.array([one.encode() for one in texts_there()])})),
    ("not-utf-8", lambda: pa.table({"text": pa.array([b"\xff\xfe" + one.encode() for one in texts_there()])})),
    ("large", lambda: pa.table({"text": pa.array(texts_there(), pa.large_string())})),
    ("view", lambda: pa.table({"text": pa.array(texts_there(), pa.string_view())})),
    ("nulls", lambda: pa.table({"text": [None, *texts_there(), None]})),
    ("numbers", lambda: pa.table({"text": [1, 2, 3]})),
    ("lists", lambda: pa.table({"text": [[one] for one in texts_there()]})),
    ("structs", lambda: pa.table({"text": [{"a": one} for one in texts_there()]})),
    ("other-name", lambda: pa.table({"content": texts_there()})),
    ("no-rows", lambda: pa.table({"text": pa.array([], pa.string())})),
    ("no-columns", lambda: pa.table({})),
    ("only-nulls", lambda: pa.table({"text": pa.nulls(9)})),
    ("twice", lambda: pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])),
)


def spoiled_text(form: str, how: str) -> Spoil:
    def spoil(chance: Chance) -> bool | None:
        spoil_bytes(chance.choice(write_as(form, texts_there())), how, chance)
        # What has a checksum has to be found out; a damaged letter of plain text is a letter.
        if how == "missing":
            return True if form in ("txt", "md", "txt.gz") else None
        return form in ("txt", "md", "jsonl", "parquet")

    return spoil


def encoded_text(form: str, change: Callable[[str], bytes]) -> Spoil:
    """Every document in another encoding: the same text, a refusal or a warning."""

    def spoil(_chance: Chance) -> bool:
        texts = texts_there()
        if form == "txt":
            for path in Path("text").glob("*.txt"):
                path.write_bytes(change(path.read_text()))
        else:
            (path,) = write_as(form, texts)
            lines = [json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in texts]
            path.write_bytes(packed(change("".join(lines)), form))
        return False

    return spoil


def odd_row(form: str, row: bytes) -> Spoil:
    def spoil(chance: Chance) -> bool:
        texts = texts_there()
        place = chance.randrange(len(texts))
        data = rows_of(texts[:place]) + row + b"\n" + rows_of(texts[place:])
        write_as(form, texts)[0].write_bytes(packed(data, form))
        return True

    return spoil


def odd_column(name: str) -> Spoil:
    def spoil(_chance: Chance) -> bool:
        table = dict(COLUMNS)[name]()
        pq.write_table(table, write_as("parquet", [])[0])
        return name not in ("dictionary", "binary", "large", "view", "nulls")

    return spoil


PLACES: dict[str, Callable[[], Any]] = {
    "link-to-itself": lambda: os.symlink("loop.txt", "text/loop.txt") or True,
    "link-to-parent": lambda: os.symlink("..", "text/again") or True,
    "link-to-nothing": lambda: os.symlink("/nowhere/at/all", "text/a.txt") or True,
    "pipe": lambda: os.mkfifo("text/pipe.txt") or True,
    "folder-named-as-file": lambda: Path("text/a.txt").mkdir() or True,
    "name-not-utf-8": lambda: Path("text/000.txt").rename(os.fsdecode(b"text/\xff.txt")),
    "long-name": lambda: Path("text/000.txt").rename("text/" + "a" * 250 + ".txt"),
    "name-with-brackets": lambda: Path("text/000.txt").rename("text/[b][i].txt"),
    "name-with-a-line-break": lambda: Path("text/000.txt").rename("text/a\nb.txt"),
    "no-files": lambda: (shutil.rmtree("text"), Path("text").mkdir(), None)[-1],
    "a-file": lambda: (shutil.rmtree("text"), Path("text").write_text("x"), None)[-1],
}
"""What else may be in a folder of text; None is one that has to be refused."""


ODD_TOML = ("-1", "nan", "inf", "1e400", '"x"', "true", "[]", "{}", "2020-01-01", "[[1]]", "[1, 'a']", "0", "'''\na'''")
NAMES = ("../../../escaped", "{here}/escaped", "", ".", "a/b", "a\\u0000b", "x" * 300, "[/b]", "-x", " ", "~")
MODELS = ('name = ["a"]', "name = 3", "", 'name = "a"\n[[model]]\nname = "a"', 'name = "a"\nseed = -1', "name = {}")
SECTIONS = (
    *("[judge]\nscorer = 3", "[judge]\nscorer = []", "[judge]\nscorer = ['x']", "[score]\nrun = 'x'", "[x]\na = 1"),
    *("train = 3", "[[report]]", "[convert]", "\0", "\ufeff", "model = 1"),
)


def study() -> Iterator[Input]:
    """Study files with values of other types, other names, damaged bytes."""
    lines = [line for line in STUDY.splitlines() if "=" in line and not line.startswith("llm")]
    for index, line in enumerate(lines):
        name = line.partition(" = ")[0]
        for number in random.Random(index).sample(range(len(ODD_TOML)), 2):
            new = f"{name} = {ODD_TOML[number]}"
            yield Input("study", f"{name}-{index}-{number}", "study", retold(line, new))
    for number, name in enumerate(NAMES):
        yield Input("study", f"name-{number}", "study", retold('name = "small"', f'name = "{name}"'))
    for number, model in enumerate(MODELS):
        yield Input("study", f"model-{number}", "study", retold('name = "small"', model))
    for number, section in enumerate(SECTIONS):
        yield Input("study", f"section-{number}", "study", retold("[report]", f"{section}\n[report]"))
    for index, how in enumerate((*BYTES, "flip", "junk") * 2):
        yield Input("study", f"{how}-{index}", "study", spoiled_study(how))


def spoiled_study(how: str) -> Spoil:
    def spoil(chance: Chance) -> bool:
        spoil_bytes(Path("study.toml"), how, chance)
        return True

    return spoil


def retold(old: str, new: str) -> Spoil:
    def spoil(_chance: Chance) -> bool:
        text = STUDY.replace(old, new.replace("{here}", str(Path.cwd().parent)), 1)
        Path("study.toml").write_text(text)
        return as_good(text)

    return spoil


def as_good(text: str) -> bool | None:
    """None, it has to be refused, if it is no TOML or has a value of another type than `STUDY` or a number below 0."""
    try:
        found = tomllib.loads(text)
    except ValueError:
        return None
    good = dict(tables(tomllib.loads(STUDY)))
    pairs = [(one, good.get(name, {}).get(key)) for name, values in tables(found) for key, one in values.items()]
    return None if any(old is not None and not fits(new, old) for new, old in pairs) else True


def tables(found: Json) -> list[tuple[str, Json]]:
    return [(name, values) for name, values in found.items() if isinstance(values, dict)]


def fits(new: Json, old: Json) -> bool:
    if isinstance(old, list):
        return all(fits(one, old[0]) for one in (new if isinstance(new, list) else [new]))
    return shape(new) == shape(old) and not (shape(new) == "number" and new < 0)


def records() -> Iterator[Input]:
    """NeuronRecords with missing, mistyped and damaged parts."""
    for index in range(70):
        yield Input("records", f"json-{index}", "import", neuron_record("json"))
    for how, index in itertools.product((*BYTES[:5], "odd"), range(6)):
        yield Input("records", f"{how}-{index}", "import", neuron_record(how))
    for name in ("a", "-1", "٣", "1" * 200, "01", "1.5", "[b]"):
        yield Input("records", f"folder-{name[:5]}", "import", moved(f"records/{name}"))
        yield Input("records", f"file-{name[:5]}", "import", moved(f"records/0/{name}.json"))


OPTIONAL = ("mean", "variance", "skewness", "kurtosis", "random_sample_by_quantile", "quantile_boundaries")


def neuron_record(how: str) -> Spoil:
    def spoil(chance: Chance) -> bool:
        path = picked("records/0/*.json", chance)
        before = json.loads(path.read_text())
        same = spoil_file(path, chance, how)
        with contextlib.suppress(
            ValueError, AttributeError, RecursionError
        ):  # what may be left open may be null or missing
            after = json.loads(path.read_text())
            same |= any(before.get(name) is not None and after.get(name) is None for name in OPTIONAL)
        return same

    return spoil


def moved(to: str) -> Spoil:
    def spoil(_chance: Chance) -> bool:
        Path("records/0/0.json" if to.endswith("json") else "records/0").rename(to)
        return False

    return spoil


class Command:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


ARGUMENTS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
ODD_NUMBERS = (-1, 0, 1.5, "1", None, True, 10**12, math.nan, [1], {})
CHECKPOINTS: dict[str, Callable[[Json], Json]] = {
    "list": lambda _: [1, 2],
    "tensor": lambda _: torch.zeros(3),
    "none": lambda _: None,
    "command": lambda found: found | {"config": Command()},
    "only-a-command": lambda _: Command(),
    "model-a-list": lambda found: found | {"model": [*found["model"].values()]},
    "model-a-tensor": lambda found: found | {"model": torch.zeros(3)},
    "model-empty": lambda found: found | {"model": {}},
    "model-none": lambda found: found | {"model": None},
    "arguments-a-list": lambda found: found | {"model_args": [1]},
    "arguments-none": lambda found: found | {"model_args": None},
    "arguments-empty": lambda found: found | {"model_args": {}},
    "keys-are-numbers": lambda found: found | {"model": dict(enumerate(found["model"].values()))},
    "step-a-text": lambda found: found | {"iter_num": "x"},
    "step-nan": lambda found: found | {"iter_num": math.nan},
    "step-a-tensor": lambda found: found | {"iter_num": torch.zeros(3)},
    "step-none": lambda found: found | {"iter_num": None},
}
TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "none": lambda _: None,
    "number": lambda _: 3.0,
    "list": lambda one: one.tolist(),
    "sparse": lambda one: one.to_sparse(),
    "integers": lambda one: one.to(torch.int64),
    "complex": lambda one: one.to(torch.complex64),
    "truth": lambda one: one > 0,
    "double": lambda one: one.double(),
    "half": lambda one: one.half(),
    "nan": lambda one: one * math.nan,
    "infinite": lambda one: one + math.inf,
    "cut": lambda one: one.flatten()[:-1],
    "scalar": lambda _: torch.tensor(1.0),
    "no-rows": lambda one: one[:0],
    "meta": lambda one: one.to("meta"),
    "expanded": lambda one: one.flatten()[:1].expand(one.shape),
}


def pt() -> Iterator[Input]:
    """Checkpoints with other things in them, and damaged bytes."""
    for name in CHECKPOINTS:
        yield Input("pt", f"{name}", "convert", resaved(lambda found, _, name=name: CHECKPOINTS[name](found), None))
    for name, index in itertools.product(TENSORS, range(2)):
        may = True if name in ("double", "half", "expanded") else None
        yield Input("pt", f"a-tensor-{name}-{index}", "convert", resaved(odd_tensor(TENSORS[name]), may))
    for argument, (number, _) in itertools.product(ARGUMENTS, enumerate(ODD_NUMBERS)):
        if not (argument == "n_head" and number == 5):  # one head is a model of its own
            yield Input("pt", f"{argument}-{number}", "convert", resaved(odd_argument(argument, number), False))
    for index, how in enumerate((*BYTES[:5], "flip", "flip", "cut", "junk", "zeros") * 3):
        yield Input("pt", f"{how}-{index}", "convert", spoiled_checkpoint(how))


def spoiled_checkpoint(how: str) -> Spoil:
    def spoil(chance: Chance) -> bool:
        spoil_bytes(Path("crate.pt"), how, chance)
        return False

    return spoil


def resaved(change: Callable[[Json, Chance], Json], may: bool | None) -> Spoil:
    def spoil(chance: Chance) -> bool | None:
        torch.save(change(torch.load("crate.pt"), chance), "crate.pt")
        return may

    return spoil


def odd_tensor(change: Callable[[torch.Tensor], Any]) -> Callable[[Json, Chance], Json]:
    def changed(found: Json, chance: Chance) -> Json:
        name = chance.choice([name for name in found["model"] if name != "lm_head.weight"])
        found["model"][name] = change(found["model"][name])
        if name == "transformer.wte.weight":
            found["model"]["lm_head.weight"] = found["model"][name]
        return found

    return changed


def odd_argument(name: str, number: int) -> Callable[[Json, Chance], Json]:
    return lambda found, _: found | {"model_args": found["model_args"] | {name: ODD_NUMBERS[number]}}


WRONG = ("-1", "nan", "x", "inf", "")
"""Values that no number among the options takes."""
QUESTIONABLE = ("0", "-inf", "1.5", "1e999", "9" * 20, "٣", "\udcff", "0x10", "1_0")
TEXTS = (
    "",
    "x" * 300,
    "[/b]",
    "\udcff",
    "../x",
    ".",
    "a\nb",
    "-",
    "{layer}",
    "%s",
    "CON",
    "=1",
    "text/000.txt/x",
    "~x",
)
"""None of them names a place outside the folder that belongs to the input, since it may be written to."""
TAKEN = {("clip", "inf"), ("max_megabytes", "inf")}
ENDLESS = {"steps", "workers", "batch_tokens", "keep", "ray", "milestones", "warmup_steps"}
"""Options that a huge value makes work for ever, as was asked."""


def options() -> Iterator[Input]:
    """Every option of every command with values that are wrong, odd, or not of its type."""
    stages = {line.split()[0]: stage for stage, (line, _) in reversed(STAGES.items())}
    for name, (kind, _, _) in SUBCOMMANDS.items():
        base = STAGES[stages[name]][0].split()
        positionals = [n for n in range(1, len(base)) if all(not word.startswith("--") for word in base[1 : n + 1])]
        llm = fields(LLMConfig) if hasattr(kind, "llm") or any(f.name == "llm" for f in fields(kind)) else ()
        for place in positionals:
            for number, value in enumerate(
                random.Random(name + str(place)).sample((*TEXTS, "text/000.txt", "data"), 8)
            ):
                label = f"{name}-place-{place}-{number}"
                yield Input("options", label, stages[name], lambda _: True, (f"#{place}", value))
        for field in (*(f for f in fields(kind) if f.name != "llm"), *llm):
            flag = f"--{field.name.replace('_', '-')}"
            if flag in base or field.name not in ("source", "run", "runs", "out", "layer", "neuron", "config"):
                for value, right in odd_values(field.name, str(field.type)):
                    label = f"{name}{flag}={value.encode('ascii', 'backslashreplace').decode()[:12]!r}"
                    more = (flag, value, value) if "float, float" in str(field.type) else (flag, value)
                    more = (f"{flag}={value}",) if "bool" in str(field.type) else more
                    yield Input("options", label, stages[name], lambda _, right=right: right, more)


def odd_values(name: str, kind: str) -> Iterator[tuple[str, bool | None]]:
    """Values, and whether another result is right (True) or it has to be refused (None)."""
    chance = random.Random(name)
    if "int" in kind or "float" in kind:
        for value in (*WRONG[:3], chance.choice(WRONG[3:])):
            yield value, True if (name, value) in TAKEN else None
        for value in chance.sample(QUESTIONABLE, 2):
            if not (name in ENDLESS and value in ("1e999", "9" * 20)):
                yield value, True
    elif "bool" in kind or "Literal" in kind or kind in ("Simulator", "Prompts"):
        yield from ((value, None) for value in ("x", ""))
    else:
        yield from ((value, True) for value in chance.sample(TEXTS, 4))


# The server that answers oddly.


class Said(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A server in a thread of the process that tries an input; `answer` makes raw bytes of what it is asked."""

    daemon_threads, allow_reuse_address = True, True
    answer: Callable[[Json], bytes | None]

    def start(self) -> int:
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        for name in ("FIRST_WAIT", "LONGEST_WAIT"):  # seconds between two tries
            setattr(client, name, 0.01)
        return self.server_address[1]

    def handle_error(self, *_: Any) -> None:
        """The other side has gone."""


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        body = self.rfile.read(length)
        said = SAID.answer(json.loads(body)) if body else http(b"{}", 405)
        if said is not None:
            self.wfile.write(said)
        else:
            time.sleep(3)


SAID = Said.__new__(Said)


def http(body: bytes | Json, status: Any = 200, *headers: str, length: int | None = None) -> bytes:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} OK", f"Content-Length: {len(body) if length is None else length}", "Connection: close"]
    return "\r\n".join([*lines, *(headers or ("Content-Type: application/json",)), "", ""]).encode() + body


def answer_to(body: Json) -> Json:
    """What a right server says."""
    text = " words such as rivers"
    tokens = body["prompt"] if isinstance(body.get("prompt"), list) else []
    top = {f"token_id:{number}": -1.0 - number / 10 for number in range(40)}
    number = len(tokens) + 1 if body.get("echo") else 1
    told = {"top_logprobs": [top] * number, "tokens": ["a"] * number, "token_logprobs": [-1.0] * number}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "text": text, "message": message, "finish_reason": "stop"}
    return {"id": "x", "choices": [choice | {"logprobs": told if body.get("logprobs") else None}], "usage": {}}


def good_answer(body: Json) -> bytes:
    return http(answer_to(body))


GOOD_TEXT = b'{"choices": [{"text": " x", "message": {"content": " x"}}]}'
RAW: dict[str, Callable[[Json], bytes | None]] = {
    "nothing": lambda _: b"",
    "silence": lambda _: None,
    "no-http": lambda _: b"\x16\x03\x01\x02\x00\x01\x00",
    "half-a-header": lambda _: b"HTTP/1.1 200 OK\r\nContent-Le",
    "cut-body": lambda body: good_answer(body)[:-30],
    "longer-than-it-is": lambda _: http(GOOD_TEXT, length=9999),
    "shorter-than-it-is": lambda _: http(GOOD_TEXT, length=5),
    "negative-length": lambda _: http(GOOD_TEXT, length=-5),
    "no-json": lambda _: http(b"<html>502 Bad Gateway</html>", 200, "Content-Type: text/html"),
    "cut-json": lambda _: http(GOOD_TEXT[:-4]),
    "empty-body": lambda _: http(b""),
    "deep-json": lambda _: http(b"[" * 90000),
    "long-number": lambda _: http(b'{"choices": ' + b"9" * 5000 + b"}"),
    "bom": lambda body: http(b"\xef\xbb\xbf" + json.dumps(answer_to(body)).encode()),
    "utf-16": lambda body: http(json.dumps(answer_to(body)).encode("utf-16")),
    "not-utf-8": lambda _: http(GOOD_TEXT.replace(b" x", b" \xff\xfe")),
    "odd-charset": lambda body: http(answer_to(body), 200, "Content-Type: application/json; charset=klingon"),
    "latin-1": lambda _: http(GOOD_TEXT.replace(b" x", b"\xe9"), 200, "Content-Type: text/plain; charset=latin-1"),
    "no-gzip": lambda _: http(GOOD_TEXT, 200, "Content-Encoding: gzip"),
    "cut-gzip": lambda _: http(gzip.compress(GOOD_TEXT)[:-9], 200, "Content-Encoding: gzip"),
    "no-zstd": lambda _: http(GOOD_TEXT, 200, "Content-Encoding: zstd"),
    "no-br": lambda _: http(GOOD_TEXT, 200, "Content-Encoding: br"),
    "odd-coding": lambda body: http(answer_to(body), 200, "Content-Encoding: klingon"),
    "bad-chunks": lambda _: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "cut-chunks": lambda _: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
    "to-itself": lambda _: http(b"", 307, "Location: /v1/completions"),
    "to-nowhere": lambda _: http(b"", 302, "Location: ftp://[::bad"),
    "status-text": lambda _: http(GOOD_TEXT, "abc"),
    "status-0": lambda _: http(GOOD_TEXT, "000"),
    "long-header": lambda _: http(GOOD_TEXT, 200, "X: " + "y" * 200_000),
    "bad-header": lambda _: http(GOOD_TEXT, 200, "no colon here"),
    "nul-header": lambda _: http(GOOD_TEXT, 200, "X: \0"),
    "events": lambda _: http(b"data: " + GOOD_TEXT + b"\n\ndata: [DONE]\n\n", 200, "Content-Type: text/event-stream"),
    **{
        f"again-after-{value}": lambda _, value=value: http({"error": "slow down"}, 429, f"Retry-After: {value}")
        for value in ("nan", "-5", "1e999", "99999999999", "Wed, 99 Foo 2015", "Wed, 21 Oct 9999 07:28:00 GMT", "\xff")
    },
    **{f"body-{number}": lambda _, odd=odd: http(odd) for number, odd in enumerate((None, 3, [], "x", {}, [{}], True))},
}
STATUSES = (
    100,
    101,
    201,
    204,
    206,
    301,
    304,
    400,
    401,
    402,
    403,
    404,
    408,
    413,
    418,
    422,
    429,
    500,
    501,
    503,
    529,
    599,
)
ERRORS = (
    {"error": {"message": "no"}},
    {"error": "no"},
    {"error": None},
    {"detail": [{"loc": []}]},
    b"\xff\xfe",
    [],
    b"",
)


def server() -> Iterator[Input]:
    """Answers that are no answers, cut connections, and right answers with one thing changed."""
    stages = [stage for stage in STAGES if stage.startswith("serve-")]
    for number, (name, raw) in enumerate(RAW.items()):
        for stage in {stages[number % 2], stages[2 + number % 2]}:
            yield Input("server", f"{name}-{stage}", stage, answering(raw))
    for number, status in enumerate(STATUSES):
        error, stage = ERRORS[number % len(ERRORS)], stages[number % 4]
        yield Input("server", f"status-{status}", stage, answering(lambda _, s=status, e=error: http(e, s)))
    for index in range(60):
        yield Input("server", f"changed-{index}", stages[index % 4], changing)
    for (index, name), number in itertools.product(enumerate(READ), range(len(VALUES))):
        stage = stages[(index + number) % 2 if index < 4 else 2 + number % 2]
        yield Input("server", f"{name}-is-{number}", stage, answering(replaced(name, VALUES[number])))
    for index in range(12):
        yield Input("server", f"sometimes-{index}", stages[index % 4], sometimes)


def answering(raw: Callable[[Json], bytes | None]) -> Spoil:
    """Explanations are the good ones or none: other text comes from no good answer (a page of HTML, half a body)."""

    def spoil(_chance: Chance) -> bool:
        SAID.answer = raw
        return True

    return spoil


READ = ("choices", "text", "message", "content", "logprobs", "top_logprobs", "token_id:1")
"""What is read of an answer."""


def replaced(name: str, new: Json) -> Callable[[Json], bytes]:
    """An answer in which everything called `name` is another thing."""

    def changed(value: Json) -> Json:
        if isinstance(value, dict):
            return {key: new if key == name else changed(one) for key, one in value.items()}
        return [changed(one) for one in value] if isinstance(value, list) else value

    return lambda body: http(changed(answer_to(body)))


def changing(chance: Chance) -> bool:
    """Every answer with the same one thing of it changed."""
    seed = chance.random()

    def answer(body: Json) -> bytes:
        found = answer_to(body)
        spoil_json(found["choices"] if seed < 0.9 else found, random.Random(seed))
        return http(found)

    SAID.answer = answer
    return True


def sometimes(chance: Chance) -> bool:
    """Right answers between wrong ones: the result is the right one in the end, or it is refused."""
    counter = itertools.count()
    wrong = chance.choice([http(b"x", 503), http(b"<html>"), b"", http(GOOD_TEXT, length=999)])
    SAID.answer = lambda body: good_answer(body) if next(counter) % 3 else wrong
    return False


TARGETS: dict[str, Callable[[], Iterator[Input]]] = {
    one.__name__: one for one in (text, study, records, pt, files, options, server)
}
