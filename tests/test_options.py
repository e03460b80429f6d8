"""Options: every number has a range, and what is refused is refused by name before anything is written."""

from __future__ import annotations

import dataclasses
import shutil
import typing
from pathlib import Path

import pytest

from cratescope import cli
from cratescope.config import NeuronsConfig
from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig
from cratescope.llm.config import LLMConfig
from cratescope.lm.config import BUDGETS, EvaluateConfig, TrainConfig
from cratescope.lm.evaluate import evaluate
from cratescope.lm.train import train
from cratescope.models.presets import preset_config
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.options import parse, ranges
from cratescope.report.config import ShowConfig
from cratescope.results.compare import Quantity
from cratescope.stages import STAGES
from cratescope.workers import processes, rank, worker_of

KINDS = (*(stage.config for stage in STAGES.values()), NeuronsConfig, LLMConfig)
OPTIONS = [(kind, name) for kind in KINDS for name in ranges(kind)]


def make(kind, **changes):
    """Settings of `kind` with something for whatever has no default."""
    fillings = {"source": "x", "runs": (Path("x"),), "layer": 0, "neuron": 0}
    options = dataclasses.fields(kind)
    required = [one.name for one in options if one.default is one.default_factory is dataclasses.MISSING]
    return kind(**({name: fillings.get(name, Path("x")) for name in required} | changes))


def words(hint):
    """Every type in an annotation."""
    return {hint} | {word for part in typing.get_args(hint) for word in words(part)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_numbers_has_a_range(kind):
    hints = typing.get_type_hints(kind)
    assert {name for name, hint in hints.items() if words(hint) & {int, float}} == ranges(kind).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_in_their_ranges(kind):
    make(kind)


def test_budgets_are_in_their_ranges():
    for budget, changes in BUDGETS.items():
        make(TrainConfig, budget=budget, **changes)


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_a_number_out_of_range_is_refused_by_its_option(kind, name):
    span = ranges(kind)[name]
    below = span.low if span.above else span.low - 1
    above = span.high if span.below else span.high + 1
    several = "tuple" in str(typing.get_type_hints(kind)[name])
    for value in (below, above, -(10**30), 10**30, float("nan"), float("inf"), float("-inf")):
        with pytest.raises(UserError, match=rf"{name.replace('_', '-')} \S+: has to be .+ (or|than) "):
            make(kind, **{name: (value,) if several else value})


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_help_of_an_option_says_its_range(kind, capsys):
    with pytest.raises(SystemExit):
        parse(kind, ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    wanted = [span("").partition(";")[0] for name, span in ranges(kind).items() if name not in ("layer", "neuron")]
    assert [span for span in wanted if span not in shown] == []


WRONG = {
    "prepare x --out new": [
        "--seed -1",
        "--max-megabytes inf",
        "--validation 0.6 --heldout 0.5",
        "--tokenizer nosuch/x",
    ],
    "train new --data data": [
        *("--seed -1", "--seed 4294967296", "--warmup-steps -5", "--adam-betas 2 3", "--clip nan", "--clip -1"),
        *("--weight-decay -1", "--min-learning-rate 1e9", "--learning-rate inf", "--context 1", "--steps 1" + "0" * 30),
        *(
            "--preset crate-9l",
            "--crate ista_steps 0",
            "--crate ista_lambda nan",
            "--crate ista_expansion 1" + "0" * 30,
        ),
        *("--crate nosuch 1", "--milestones 0.5 nan", "--keep 1", "--workers 99999", "--data nodata", "--save-every 7"),
    ],
    "evaluate run": ["--crops 0", "--on nosuch"],
    "collect run": [
        *("--random -3", "--layers -1", "--layers 99", "--layers", "--site ..", "--worker 2/2", "--context 0"),
        *(
            "--worker 1/" + "9" * 5000,
            "--ray -1",
            "--ray-gpus nan",
            "--ray-gpus 1.5",
            "--context 33",
            "--top 1" + "0" * 30,
        ),
    ],
    "sae run": [
        *(
            "--k 0",
            "--k 99999",
            "--expansion 0",
            "--grid k=x",
            "--grid colour=red",
            "--prefixes 0.5 1",
            "--penalty nan",
        ),
        *(
            "--name a/b",
            "--site ..",
            "--layers 99",
            "--batch 70000",
            "--learning-rate 0",
            "--from nosuch",
        ),
    ],
    "explain run": [
        "--neuron-seed -1",
        "--neurons 0",
        "--llm-timeout 1" + "0" * 30,
        "--layers -1",
    ],
    "simulate run": ["--neurons 0", "--llm http://x/v1", "--prompts openai", "--worker x"],
    "judge run": ["--neurons -1", "--llm-batch 0"],
    "report run --out new": ["--cards -1", "--primary x", "--primary uniform/nosuch", "--primary nosuch/pearson"],
    "export run --out new": ["--layers -1"],
    "show run": ["-1 0", "0 1" + "0" * 30],
}
WITHOUT_A_RUN = (
    *("evaluate", "sae", "collect", "explain", "simulate", "judge", "score"),
    *("show", "export", "import", "convert"),
)


@pytest.fixture
def place(tmp_path, monkeypatch, data_folder, runs_folder):
    """A folder with `data` and a `run`, to be in."""
    shutil.copytree(data_folder, tmp_path / "data")
    shutil.copytree(runs_folder / "crate", tmp_path / "run")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("Some words.\n" * 9)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder):
    """Every file and folder, and when files were written; but for the note that copied shards were verified."""
    noted = folder / "data" / ".verified.json"
    return {path: path.is_file() and path.stat().st_mtime_ns for path in folder.rglob("*") if path != noted}


def refused(command):
    """The one line, with which nothing was written."""
    before = everything(Path())
    with pytest.raises(UserError) as caught:
        cli.run(command.split(" ") if isinstance(command, str) else command)
    assert everything(Path()) == before, command
    return str(caught.value)


def test_a_refused_command_writes_and_claims_nothing(place):
    for command, options in WRONG.items():
        for option in options:
            name = option.split()[0] if option.startswith("--") else "layer"
            said = refused(f"{command} {option}")
            assert len(said) < 400
            assert name in said or name[2:] in said.replace("_", "-") or option.split()[-1] in said, (option, said)


def test_without_a_run_nothing_is_written(place):
    more = {"show": ["0", "0"], "export": ["--out", "new"], "import": ["--out", "new"], "convert": ["new"]}
    for command in WITHOUT_A_RUN:
        for run in ("nosuch", "x/a.txt"):
            assert run in refused([command, run, *more.get(command, [])])


def test_an_llm_that_cannot_be_loaded_leaves_no_folder(tmp_path, monkeypatch):
    from test_explain import make_run

    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for llm in ("run", "x.gguf", "http://localhost:9/v1"):
        assert f"--llm {llm}" in refused(["explain", "run", "--llm", llm])


@pytest.mark.parametrize("option", ["--data", "--preset", "--out"])
def test_an_empty_value_is_refused_and_never_the_folder_one_is_in(option):
    for words_ in ([option, ""], [f"{option}="]):
        with pytest.raises(UserError, match=f"{option}: is empty"):
            parse(TrainConfig, ["run", "--data", "d", *words_])
    parse(ExplainConfig, ["run", "--llm-model", "", "--llm-tokenizer="])


def test_text_that_no_file_can_hold_is_refused():
    for text in ("a\0b", "a\udcffb"):
        with pytest.raises(UserError, match="out .*: is not UTF-8"):
            make(TrainConfig, out=Path(text))
        with pytest.raises(UserError, match="--explainer .*: is not UTF-8"):
            make(ShowConfig, explainer=text)


def test_the_last_budget_counts():
    config = parse(TrainConfig, ["run", "--data", "d", "--budget", "hour", "--budget=minutes"])
    assert (config.budget, config.steps) == ("minutes", BUDGETS["minutes"]["steps"])


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "-1", "1.5", "²", "9" * 5000])
def test_an_environment_that_is_no_number_is_refused_by_name(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} = "):
        rank(local=True) if name == "LOCAL_RANK" else processes() + rank()
    with pytest.raises(SystemExit) as stop:
        cli.run_and_exit(["collect", "nosuch"])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_environment_without_processes_is_refused_and_an_empty_one_is_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "0")
    with pytest.raises(UserError, match="WORLD_SIZE = '0': has to be a number of 1 or more"):
        processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK and WORLD_SIZE 2/2"):
        worker_of("auto")
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", "")
    assert worker_of("auto") == (0, 1)


@pytest.mark.parametrize("field", ["ista_steps", "ista_expansion", "ista_step_size", "ista_lambda"])
def test_fields_of_crate_have_ranges_too(field):
    for value in ("nan", "inf", "-1", "1" + "0" * 30, "x", "", "9" * 5000):
        if field in ("ista_step_size", "ista_lambda") and value == "1" + "0" * 30:
            continue  # odd, and a number
        with pytest.raises(UserError, match=field) as caught:
            preset_config("crate-1l", crate={field: value})
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["nosuch/pearson", "uniform/nosuch", "uniform/pearson/nosuch"])
def test_a_primary_measure_of_unknown_names_is_refused(text):
    with pytest.raises(UserError, match=r"(there is|uniform has) no \w+ 'nosuch'; choose from"):
        Quantity.parse(text)
    assert Quantity.parse("detection-top/auroc/untrained").measure == "auroc"


def test_a_primary_measure_is_one_that_the_protocol_has():
    for name in ("balanced", "unseen", "specific"):
        assert Quantity.parse(f"uniform/{name}/shuffled") == Quantity("uniform", name, "shuffled")
    for text in ("top-and-random/balanced/shuffled", "detection/pearson", "uniform/accuracy"):
        with pytest.raises(UserError, match=f"--primary {text}: .* has no measure '.*'; choose from"):
            Quantity.parse(text)


def test_paths_may_hold_what_looks_like_markup(place):
    odd = place / "[link=x]a[" / "b]{0}%s[red]"
    odd.mkdir(parents=True)
    shutil.move(place / "data", odd / "data")
    small = {"context": 32, "batch_tokens": 64, "micro_batch": 2, "steps": 2, "save_every": 1, "validate_every": 1}
    small |= {"log_every": 1, "validation_crops": 2, "preset": "crate-1l", "device": "cpu"}
    run = train(TrainConfig(odd / "[/b]" / "[bold]{x}", odd / "data", **small))
    evaluate(EvaluateConfig(run.root, crops=2))
    collect(CollectConfig(run.root, excerpts=4, window=8))
    assert (run.root / "records" / "codes" / "layer-00.parquet").exists()
