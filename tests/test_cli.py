"""The command line as a user meets it: bad input is one line and exit code 2, never a stack trace."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest

from cratescope import cli
from cratescope.lm.config import TrainConfig
from cratescope.options import parse
from cratescope.stages import STAGES
from cratescope.text.shards import TokenData


def fails(capsys, *arguments):
    """Run a command that must fail, in this process, and return its one line."""
    with pytest.raises(SystemExit) as stop:
        cli.run_and_exit(list(map(str, arguments)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("cratescope: ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


def test_the_overview_names_every_subcommand(capsys):
    shown = cli.run(["--help"])
    assert all(f"\n  {name} " in shown for name in STAGES) and cli.run([]) == shown


def test_every_subcommand_has_a_help_with_all_of_its_options(capsys):
    for name, (kind, _, _) in STAGES.items():
        with pytest.raises(SystemExit) as stop:
            cli.run([name, "--help"])
        assert stop.value.code == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert kind.__doc__.split(".")[0] in shown
        flags = {f"--{field.name.removesuffix('_').replace('_', '-')}" for field in dataclasses.fields(kind)}
        positional = {"--source", "--run", "--runs", "--config", "--out", "--llm", "--layer", "--neuron"}
        nested = {"--selected", "--how"}
        assert not [flag for flag in flags - positional - nested if flag not in shown]


def test_a_budget_sets_defaults_that_options_override():
    config = parse(TrainConfig, ["run", "--data", "d", "--budget", "minutes", "--steps", "7"])
    assert (config.steps, config.context, config.learning_rate) == (7, 256, 2e-3)
    assert parse(TrainConfig, ["run", "--data", "d", "--budget=minutes", "--steps", "7"]) == config
    paper = parse(TrainConfig, ["run", "--data", "d"])
    assert (paper.steps, paper.batch_tokens, paper.learning_rate) == (600_000, 491_520, 6e-4)


def test_an_unknown_command_or_option_exits_with_2(capsys):
    assert "no command 'trian'" in fails(capsys, "trian")
    with pytest.raises(SystemExit) as stop:
        cli.run_and_exit(["train", "run", "--data", "d", "--stepz", "3"])
    assert stop.value.code == 2


def test_bad_input_is_one_line_that_names_the_thing_and_the_fix(capsys, tmp_path, runs_folder, data_folder):
    (tmp_path / "empty.txt").write_text("")
    prepare = ("prepare", "--out", tmp_path / "data", "--tokenizer", "bpe:300")
    assert "nothing.txt" in fails(capsys, *prepare, tmp_path / "nothing.txt")
    assert "empty" in fails(capsys, *prepare, tmp_path / "empty.txt")
    assert "no CUDA" in fails(capsys, "train", tmp_path / "r", "--data", data_folder, "--device", "cuda")
    assert "make one with `cratescope prepare`" in fails(capsys, "train", tmp_path / "r", "--data", tmp_path)
    assert "not a run directory" in fails(capsys, "collect", tmp_path / "r")
    assert "longer than the 32 tokens" in fails(capsys, "collect", runs_folder / "crate", "--context", "64")
    assert "run `cratescope collect` first" in fails(capsys, "explain", runs_folder / "crate", "--site", "resid")
    assert "no such file" in fails(capsys, "convert", tmp_path / "none.pt", tmp_path / "out")


def test_progress_leaves_no_empty_lines_where_there_is_no_terminal(capsys, tmp_path, text_folder):
    data, run, cpu = tmp_path / "data", tmp_path / "run", ("--device", "cpu")
    small = ("--context", 32, "--batch-tokens", 64, "--micro-batch", 2, "--steps", 2, "--warmup-steps", 1)
    every = ("--log-every", 1, "--save-every", 1, "--validate-every", 1, "--validation-crops", 2)
    for arguments in (
        ("prepare", text_folder, "--out", data, "--tokenizer", "bpe:300", "--validation", 0.2, "--heldout", 0.3),
        ("train", run, "--data", data, "--preset", "crate-1l", *small, *every, *cpu),
        ("evaluate", run, "--crops", 2, *cpu),
        ("collect", run, "--excerpts", 8, *cpu),
    ):
        cli.run_and_exit(list(map(str, arguments)))
        assert "" not in capsys.readouterr().err.splitlines()


def test_numbers_below_1_are_refused_where_they_make_no_sense(capsys, runs_folder):
    assert "--part 0: has to be 1 or more" in fails(capsys, "collect", runs_folder / "crate", "--part", 0)
    assert "--llm-batch 0" in fails(capsys, "explain", runs_folder / "crate", "--llm-batch", 0)


def test_a_folder_of_something_else_is_not_claimed(capsys, data_folder, tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert "use another folder" in fails(capsys, "train", tmp_path, "--data", data_folder, "--context", 32,
                                         "--micro-batch", 2, "--batch-tokens", 64)  # fmt: skip
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a web page"}'


def test_a_shard_that_was_changed_is_refused_by_name(capsys, data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    shard = tmp_path / "data" / TokenData.open(data_folder).manifest["splits"]["train"]["shards"][0]["file"]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert f"{shard.name}: damaged" in fails(capsys, "train", tmp_path / "run", "--data", tmp_path / "data")


def test_a_model_folder_with_a_missing_tensor_is_refused(capsys, runs_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(runs_folder / "crate" / "model", tmp_path / "model")
    (tmp_path / "model" / "whole.json").unlink()  # the checksums would tell first
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    dictionary = weights.pop("transformer.h.0.ista.D")
    save_file(weights, path, {"format": "pt"})
    assert "missing transformer.h.0.ista.D" in fails(capsys, "convert", tmp_path / "model", tmp_path / "out.pt")
    save_file(weights | {"transformer.h.0.ista.D": dictionary, "odd": dictionary.clone()}, path, {"format": "pt"})
    assert "unexpected odd" in fails(capsys, "convert", tmp_path / "model", tmp_path / "out.pt")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(capsys, small_disk, text_folder, data_folder):
    (small_disk / "ballast").write_bytes(bytes(900_000))
    assert "disk full" in fails(capsys, "train", small_disk / "run", "--data", data_folder, "--context", 32,
                                "--micro-batch", 2, "--batch-tokens", 64, "--steps", 0)  # fmt: skip
    assert not (small_disk / "run" / "model").exists() and not (small_disk / "run" / "run.json").exists()
    (small_disk / "ballast").write_bytes(bytes(1_030_000))
    splits = ("--tokenizer", "bpe:320", "--validation", 0.2, "--heldout", 0.3)
    assert "disk full" in fails(capsys, "prepare", text_folder, "--out", small_disk / "data", *splits)
    assert not list(small_disk.rglob("*.npy"))


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.run_and_exit([])
    assert stop.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "cratescope", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("cratescope: no command") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["trian"]])
def test_a_reader_that_has_gone_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": writer} if arguments == ["trian"] else {"stdout": writer}
    done = subprocess.run([sys.executable, "-m", "cratescope", *arguments], **{"stderr": subprocess.PIPE} | streams)
    os.close(writer)
    assert not done.stderr and not done.stdout
    assert done.returncode == 128 + signal.SIGPIPE
