"""The zoo: models that come with the package, copied where a run is asked for, and never written to."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cratescope as cs
from conftest import SMALL_TRAINING
from cratescope import cli, zoo
from cratescope.config import StudyConfig
from cratescope.errors import UserError
from cratescope.files import check_whole, read_json
from cratescope.lm.config import TrainConfig
from cratescope.lm.train import train
from cratescope.run import Run
from cratescope.study import study
from cratescope.text.config import PrepareConfig
from cratescope.text.prepare import prepare
from cratescope.text.tokenizer import load_tokenizer
from processes import killed_before

ROOT = Path(__file__).parent.parent
PACKAGED = zoo.ZOO
LARGEST = 12_000_000
"""Bytes of the whole zoo, which every installation carries."""


def maker():
    spec = importlib.util.spec_from_file_location("make_zoo", ROOT / "studies" / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(runs_folder, tmp_path_factory):
    """A zoo of two tiny models, as the script that makes the package's makes it."""
    folder = tmp_path_factory.mktemp("package") / "zoo"
    for name in ("crate", "gpt2"):
        maker().add(Run(runs_folder / name), folder, crops=4)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """An empty current folder, in front of a package with that zoo."""
    monkeypatch.setattr(zoo, "ZOO", made)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said_by(capsys, *arguments):
    cli.run_and_exit([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.run_and_exit([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


# What comes with the package.


def entries():
    return [pytest.param(PACKAGED / name, id=name) for name in sorted(path.name for path in PACKAGED.glob("*/"))]


def test_the_zoo_is_found_as_data_of_the_package_and_is_small():
    folder = resources.files("cratescope") / "zoo"
    assert {entry.name for entry in folder.iterdir() if entry.is_dir()} == {*zoo.names()} != set()
    assert sum(path.stat().st_size for path in PACKAGED.rglob("*")) < LARGEST


@pytest.mark.parametrize("entry", entries())
def test_a_packaged_model_is_whole_trained_and_says_nothing_of_the_machine_it_was_made_on(entry):
    check_whole(entry / "model")
    weights = load_file(entry / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    run = Run(entry)
    model = run.load_model()
    assert model.dtype == torch.float32 and model.num_parameters() == run.read_manifest()["parameters"]
    assert not cs.Arm.of(run.read_manifest()).untrained and run.name == run.read_manifest()["name"] == entry.name
    texts = [path.read_text(encoding="utf-8") for path in entry.rglob("*.json*") if path.name != "tokenizer.json"]
    assert not re.search(r'"(/|Linux|Darwin)', "".join(texts))
    assert not any(path.suffix == ".py" for path in entry.rglob("*"))


@pytest.mark.parametrize("entry", entries())
def test_the_card_states_the_measured_loss_of_every_packaged_model(entry):
    row = maker().row(entry)
    assert re.search(r"zoo/[a-z0-9-]+` \| \d+\.\d\dM \| \d\.\d{3} \| \d\.\d{3} ± 0\.\d{3} \|", row)
    assert row in (PACKAGED / "README.md").read_text(encoding="utf-8")


def test_packaged_models_share_one_tokenizer_and_one_text():
    tokenizers = {(PACKAGED / name / "model" / "tokenizer.json").read_bytes() for name in zoo.names()}
    texts = {read_json(PACKAGED / name / "run.json")["data"]["manifest_sha256"] for name in zoo.names()}
    assert len(tokenizers) == len(texts) == 1


def test_a_wheel_holds_the_whole_zoo(tmp_path):
    pytest.importorskip("setuptools")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    shutil.copytree(ROOT / "src" / "cratescope", tree / "src" / "cratescope")
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tree.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if name.startswith("cratescope/zoo/")}
    assert packed == {f"cratescope/zoo/{name}" for name in contents(PACKAGED)}


# The copy.


def test_the_listing_names_every_model_with_its_kind_and_loss(here, made, capsys):
    header, *lines = said_by(capsys, "zoo").splitlines()
    assert header.split()[:2] == ["model", "kind"] and header.endswith("validation loss")
    assert [line.split()[:2] for line in lines[:2]] == [["zoo/crate", "CRATE"], ["zoo/gpt2", "GPT-2"]]
    for line, name in zip(lines, ("crate", "gpt2"), strict=False):
        assert f"{read_json(made / name / 'evaluation.json')['loss']:.3f}" in line
    assert not any(here.iterdir())


def test_the_listing_of_the_package_fits_a_terminal(capsys):
    lines = said_by(capsys, "zoo").splitlines()
    assert len(lines) > len(zoo.names()) and max(map(len, lines)) <= 80


def test_the_first_use_copies_a_model_and_later_ones_keep_what_is_there(here, made, capsys):
    run = cs.Run("zoo/crate")
    assert capsys.readouterr().err == "zoo/crate: copied from cratescope's zoo\n"
    assert contents(run.root) == contents(made / "crate")
    (run.root / "mine.txt").write_text("a result")
    (run.root / "metrics.jsonl").unlink()
    assert cs.Run(Path("zoo/crate")) == run and capsys.readouterr().err == ""
    assert (run.root / "mine.txt").exists() and not run.metrics.exists()
    assert [path.name for path in (here / "zoo").iterdir()] == ["crate"]


def test_only_the_very_name_brings_a_model(here):
    for name in (
        "crate",
        "zoo",
        "zoo/nope",
        "zoo/crate/model",
        "other/zoo/crate",
        here / "zoo" / "crate",
        "zoo/../zoo/crate",
    ):
        cs.Run(name)
    assert not any(here.iterdir())


def test_a_copy_of_a_read_only_package_can_be_written_to(here, made, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "zoo"
    shutil.copytree(made, package)
    for path in package.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setattr(zoo, "ZOO", package)
    run = cs.Run("zoo/gpt2")
    assert all(path.stat().st_mode & 0o200 for path in (run.root, *run.root.rglob("*")))


def test_a_copy_killed_anywhere_is_whole_or_absent(here, made, monkeypatch):
    copy = shutil.copyfile

    def halfway(source, target):
        Path(target).write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        os.replace(target, target)  # a change of the disk to be killed before
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", halfway)
    for change in range(100):
        changes = killed_before(change, lambda: zoo.bring(Path("zoo/crate")))
        copied = Path("zoo/crate")
        assert not copied.exists() or contents(copied) == contents(made / "crate")
        if changes <= change:
            break
        shutil.rmtree(copied, ignore_errors=True)
    assert change > len(contents(made / "crate")) and copied.exists()
    assert [path.name for path in Path("zoo").iterdir()] == ["crate"]  # what killed copies left is gone


def test_a_process_that_copies_more_slowly_does_not_undo_what_the_faster_one_has_done(here, made, monkeypatch):
    copy = shutil.copyfile

    def overtaken(source, target):
        monkeypatch.setattr(shutil, "copyfile", copy)
        faster = cs.Run("zoo/crate")
        (faster.root / "result.txt").write_text("measured meanwhile")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", overtaken)
    slower = cs.Run("zoo/crate")
    assert (slower.root / "result.txt").read_text() == "measured meanwhile"
    assert contents(slower.root).keys() == {*contents(made / "crate"), "result.txt"}
    assert [path.name for path in Path("zoo").iterdir()] == ["crate"]


STAGES = {
    **{name: () for name in ("sae", "collect", "evaluate", "explain", "simulate", "judge", "score")},
    "show": (0, 0),
    "report": ("--out", "page"),
    "export": ("--out", "records", "--format", "openai"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_name_is_one_line_that_lists_the_zoo(stage, here, capsys):
    said = refused(capsys, stage, "zoo/crater", *STAGES[stage])
    assert said == "cratescope: zoo/crater: not a run directory (no run.json); the zoo has crate, gpt2\n"
    assert not any(here.iterdir())


def test_training_into_the_folder_of_a_packaged_model_is_refused(here, data_folder):
    with pytest.raises(UserError, match="was made with seed = 0, not 5; its model is trained already"):
        train(TrainConfig(Path("zoo/crate"), data_folder, preset="crate-1l", seed=5, **SMALL_TRAINING))


# Text for it.


def test_the_tokenizer_of_a_packaged_model_gives_its_ids_without_copying_it(here, text_folder, data_folder):
    data = prepare(PrepareConfig(str(text_folder), here / "data", tokenizer="zoo/crate", validation=0.2, heldout=0.3))
    assert [path.name for path in here.iterdir()] == ["data"]
    for split in ("train", "heldout"):
        ours, theirs = ((folder / f"{split}-00000.npy").read_bytes() for folder in (data.path, data_folder))
        assert ours == theirs
    assert load_tokenizer("zoo/gpt2").get_vocab() == data.tokenizer.get_vocab()


def test_without_text_the_command_that_makes_some_is_named_and_works(here, text_folder, capsys):
    said = refused(capsys, "collect", "zoo/crate", "--excerpts", "8")
    command = re.search("`cratescope (prepare offline .*)`", said)[1].split()
    assert said.count("\n") == 2 and "no such folder" in said  # that it was copied, and the error
    command[1] = str(text_folder)
    said_by(capsys, *command, "--validation", "0.2", "--heldout", "0.3")
    said_by(capsys, "collect", "zoo/crate", "--excerpts", "8")
    assert Path("zoo/crate/records/codes/layer-00.parquet").exists()


@pytest.mark.parametrize(
    "options, warned",
    [
        (("--validation", 0.2, "--heldout", 0.3, "--max-megabytes", 0.05), False),
        (("--validation", 0.1, "--heldout", 0.4), False),
        (("--validation", 0.2, "--heldout", 0.4), True),
        (("--validation", 0.2, "--heldout", 0.3, "--seed", 1), True),
    ],
)
def test_a_model_is_not_silently_given_text_as_held_out_that_it_was_trained_on(
    options, warned, here, text_folder, capsys
):
    said_by(capsys, "prepare", text_folder, "--out", "text", "--tokenizer", "zoo/crate", *options)
    for stage in (("evaluate", "--crops", 2), ("collect", "--excerpts", 8)):
        cli.run_and_exit([*map(str, (stage[0], "zoo/crate", "--data", "text", *stage[1:]))])
        said = capsys.readouterr().err
        assert (
            "warning: text may hold out text that zoo/crate was trained on; prepare it with --seed 0, and" in said
        ) == (warned)
        assert not warned or "--validation and --heldout of at most 0.5 together" in said


def test_other_text_is_not_taken_for_text_that_a_model_was_trained_on(here, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    for number in range(40):
        (tmp_path / "other" / f"{number}.txt").write_text(f"The captain saw {number} ships. " * 20)
    said_by(
        capsys, "prepare", "other", "--out", "text", "--tokenizer", "zoo/crate", "--heldout", 0.7, "--validation", 0.1
    )
    cli.run_and_exit(["evaluate", "zoo/crate", "--data", "text", "--crops", "2"])
    assert "warning" not in capsys.readouterr().err


def test_the_packaged_models_say_how_their_text_was_split():
    for name in zoo.names():
        assert read_json(PACKAGED / name / "run.json")["data"]["split_by"]["source_files"]


def test_text_of_another_tokenizer_of_the_same_size_is_refused(here, capsys, tmp_path):
    (tmp_path / "other").mkdir()
    for number in range(60):
        (tmp_path / "other" / f"{number}.txt").write_text(f"Zwölf Boxkämpfer jagen {number} Viktor quer. " * 20)
    prepare(PrepareConfig(str(tmp_path / "other"), tmp_path / "text", tokenizer="bpe:320", validation=0.2, heldout=0.3))
    for stage in ("collect", "evaluate"):
        said = refused(capsys, stage, "zoo/crate", "--data", "text")
        assert "text is text of another tokenizer than zoo/crate's" in said
        assert "--tokenizer zoo/crate/model" in said


# Every stage on it.

PLAN = """
[prepare]
source = "{text}"
tokenizer = "zoo/crate"
validation = 0.2
heldout = 0.3
[[model]]
run = "zoo/crate"
[[model]]
run = "zoo/gpt2"
[evaluate]
crops = 8
[collect]
excerpts = 40
window = 8
[explain]
explainer = "terms"
[neurons]
neurons = 8
simulators = ["terms"]
[report]
cards = 2
"""


def test_every_stage_takes_a_model_of_the_zoo_and_leaves_the_package_as_it_was(here, made, data_folder, capsys):
    before = contents(made)
    terms = ("--explainer", "terms")
    said_by(capsys, "evaluate", "zoo/crate", "--data", data_folder, "--crops", "4")
    said_by(capsys, "collect", "zoo/crate", "--data", data_folder, "--excerpts", "40", "--window", "8")
    said_by(capsys, "explain", "zoo/crate", *terms, "--neurons", "8")
    said_by(capsys, "simulate", "zoo/crate", *terms, "--simulator", "terms")
    assert "top-and-random" in said_by(capsys, "score", "zoo/crate", *terms, "--simulator", "terms")
    assert "layer 0" in said_by(capsys, "show", "zoo/crate", "0", "3")
    said_by(capsys, "report", "zoo/crate", *terms, "--simulator", "terms", "--out", "page")
    said_by(capsys, "export", "zoo/crate", "--format", "openai", "--out", "exported")
    assert {path.name for path in here.iterdir()} == {"zoo", "page", "exported"}
    assert contents(made) == before


def test_a_study_takes_models_that_are_there_and_reads_its_own_text(here, made, text_folder):
    Path("plan.toml").write_text(PLAN.format(text=text_folder))
    page = study(StudyConfig(Path("plan.toml"), Path("out")))
    assert "crate" in page.read_text() and "gpt2" in page.read_text()
    assert {path.name for path in Path("out").iterdir()} == {"data", "report"}
    for name, site in (("crate", "codes"), ("gpt2", "mlp")):
        assert list(Path("zoo", name, "explanations", site, "terms").rglob("layer-00.parquet"))
    study(StudyConfig(Path("plan.toml"), Path("out")))


@pytest.mark.parametrize(
    "model, said",
    [
        ('run = "zoo/crater"', "zoo/crater: not a run directory.*the zoo has crate, gpt2"),
        ('run = "zoo/crate"\npreset = "crate-1l"', "run = 'zoo/crate' is there already; leave out preset"),
        ('run = ""', "run = '' is not a path of a run directory"),
        ("run = 3", "run = 3 is not a path of a run directory"),
        ('run = "zoo/crate"\n[[model]]\nrun = "./zoo/crate"', "is the name of another one too"),
        ('run = "out"', "out: not a run directory"),
    ],
)
def test_a_model_that_is_not_there_or_is_to_be_trained_too_is_refused(model, said, here):
    Path("plan.toml").write_text(f'[prepare]\nsource = "x"\n[[model]]\n{model}\n')
    with pytest.raises(UserError, match=said):
        study(StudyConfig(Path("plan.toml"), Path("out")))
    assert not Path("out").exists()


def test_make_quick_shows_models_that_the_zoo_has():
    plan = tomllib.loads((ROOT / "studies" / "quick.toml").read_text())
    named = re.findall(r"zoo/[\w-]+", (ROOT / "Makefile").read_text()) + [model["run"] for model in plan["model"]]
    assert {plan["prepare"]["tokenizer"], *named} <= {f"zoo/{name}" for name in zoo.names()}
    assert {model["run"].split("-")[0] for model in plan["model"]} == {"zoo/crate", "zoo/gpt2"}


def test_an_untrained_run_is_no_model_of_the_zoo(runs_folder, tmp_path):
    run = Run(tmp_path / "untrained")
    shutil.copytree(runs_folder / "crate", run.root)
    run.metrics.unlink()
    with pytest.raises(UserError, match="has not been trained"):
        maker().add(run, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()
