"""Several processes on one folder, processes that were killed, and paths that nobody can write."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cratescope.cli import run as cli_run
from cratescope.cli import run_and_exit
from cratescope.errors import UserError, unusable
from cratescope.files import atomic_folder, atomic_path, make_folder, write_text
from cratescope.locks import locked
from cratescope.neurons.sample import find_site
from cratescope.run import Run, claim
from fake_run import fake_run
from processes import start

HOLD = """
import sys, time
from pathlib import Path
from cratescope.files import atomic_folder, atomic_path
from cratescope.locks import locked
folder = Path(sys.argv[1])
with locked(folder, "train"), atomic_path(folder / "a.json") as a, atomic_folder(folder / "records" / "codes") as b:
    a.write_text("half")
    (b / "layer").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "run" and writes a file and a folder there."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


HEADER = """
import sys, time
from pathlib import Path
from cratescope.files import atomic_folder, atomic_path, write_text
from cratescope.locks import locked
"""


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_second_process_is_told_in_one_line_who_works_there(holder, tmp_path):
    with pytest.raises(UserError) as refused, locked(tmp_path / "run", "train"):
        pytest.fail("both are inside")
    said = str(refused.value)
    assert f"in use by process {holder.pid} on " in said and "since 20" in said and "\n" not in said
    with locked(tmp_path / "run", "evaluate"):
        pass  # another stage


@pytest.mark.parametrize("stage", ["train", "prepare", "evaluate", "report", "import"])
def test_each_stage_refuses_a_folder_where_another_process_is_at_it(stage, tmp_path, runs_folder, data_folder):
    run = fake_run(tmp_path / "crate")
    (tmp_path / "records" / "0").mkdir(parents=True)
    (tmp_path / "records" / "0" / "0.json").write_text("{}")
    out = tmp_path / "out"
    command = {
        "train": f"{out} --data {data_folder} --preset crate-1l --context 32 --batch-tokens 384 --device cpu",
        "prepare": f"{Path(__file__).parent / 'golden'} --out {out} --tokenizer bpe:300",
        "evaluate": f"{out} --data {data_folder}",
        "report": f"{run.root} --out {out}",
        "import": f"{tmp_path / 'records'} --out {out}",
    }[stage]
    if stage == "evaluate":
        shutil.copytree(runs_folder / "crate", out)
    code = HEADER + "with locked(Path(sys.argv[1]), sys.argv[2]):\n"
    code += "    print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, out, stage], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            before = names(out)
            with pytest.raises(UserError, match=f"out: in use by process {process.pid} on "):
                cli_run([stage, *command.split()])
            assert names(out) == before
        finally:
            process.kill()


def test_a_killed_training_can_be_gone_on_with_at_once_and_two_cannot_run(tmp_path, data_folder):
    out = tmp_path / "run"
    command = f"train {out} --data {data_folder} --preset crate-1l --context 32 --batch-tokens 128 --micro-batch 2"
    command += " --steps 5000 --warmup-steps 2 --save-every 10 --log-every 1 --validate-every 0 --validation-crops 2"
    first = start(f"{command} --workers 1 --device cpu --dtype float32".split())
    deadline = time.monotonic() + 100
    while not [*out.glob("checkpoints/checkpoint-*")] and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(UserError, match="in use by process"):
        cli_run(f"{command} --device cpu --dtype float32".split())
    os.kill(first.pid, signal.SIGKILL)  # it alone: a worker of its data loader lives a moment longer
    first.join()
    with locked(out, "train"):
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert steps == sorted(set(steps))


def test_kill_ends_the_lock_and_the_next_process_removes_what_was_left(holder, tmp_path):
    run = tmp_path / "run"
    write_text(run / "b.json", "whole")  # while the first one still lives: nothing of it is touched
    (run / "records" / "codes-2").mkdir()
    assert len([name for name in names(run) if name.endswith(".tmp")]) == 2
    assert find_site(Run(run), "auto") == "codes-2"  # a temporary folder is no site
    holder.kill()
    holder.wait()
    assert find_site(Run(run), "auto") == "codes-2"
    code = HEADER + "folder = Path(sys.argv[1])\n"
    code += "with locked(folder, 'train'): write_text(folder / 'a.json', 'whole')\n"
    code += "with atomic_folder(folder / 'records' / 'codes') as new: (new / 'layer').write_text('whole')"
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)
    assert names(run) == ["a.json", "b.json", "records", "records/codes", "records/codes-2", "records/codes/layer"]


def test_temporaries_of_another_machine_are_left_for_a_week(tmp_path):
    for name, age in (("new", 0), ("old", 8 * 86400)):
        path = tmp_path / f".{name}.0123abcd.17-0.tmp"
        path.write_text("half")
        os.utime(path, (time.time() - age,) * 2)
    (tmp_path / ".mine.17.tmp").write_text("of another program")
    write_text(tmp_path / "a", "")
    assert names(tmp_path) == [".mine.17.tmp", ".new.0123abcd.17-0.tmp", "a"]


def test_a_lock_is_waited_for_where_that_takes_a_moment_only(tmp_path):
    code = HEADER + "with locked(Path(sys.argv[1]), 'score'):\n"
    code += "    print('ready', flush=True); time.sleep(0.5); write_text(Path(sys.argv[1]) / 'a', 'first')"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    with locked(tmp_path, "score", wait=True), locked(tmp_path, "score"):
        assert (tmp_path / "a").read_text() == "first"
    process.communicate()
    assert names(tmp_path) == ["a"]


def test_a_folder_made_for_a_lock_goes_with_it_when_nothing_came_of_it(tmp_path):
    with pytest.raises(UserError), locked(tmp_path / "new", "import"):
        raise UserError("refused")
    assert names(tmp_path) == []


def test_of_two_claims_made_at_once_the_first_holds(tmp_path):
    with atomic_path(tmp_path / "manifest.json", first=True) as late:
        claim(tmp_path, {"seed": 1})
        late.write_text('{"identity": {"seed": 2}}')
    with pytest.raises(UserError, match="seed = 1, not 2"):
        claim(tmp_path, {"seed": 2})


def test_a_folder_put_there_meanwhile_is_replaced_whole(tmp_path):
    with atomic_folder(tmp_path / "model") as second:
        (second / "b").write_text("2")
        with atomic_folder(tmp_path / "model") as first:
            (first / "a").write_text("1")
    assert names(tmp_path) == ["model", "model/b"]


def unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "deep")
    return [
        tmp_path / "file",
        tmp_path / "file" / "below",
        tmp_path / ("x" * 300),
        tmp_path / "loop" / "a",
        Path("/proc/nothing/here"),
        Path("/sys/nothing"),
        Path("/dev/null"),
        Path("/dev/null/a"),
    ]


def test_a_path_that_cannot_be_written_is_named_in_one_line_with_a_fix(tmp_path):
    for path in unwritable(tmp_path):
        for write in (make_folder, lambda path: write_text(path / "a", ""), lambda path: claim(path, {"a": 1})):
            with pytest.raises(UserError) as refused:
                write(path)
            said = str(refused.value)
            assert "\n" not in said and len(said) < 400 and said.startswith(str(path)[:100]), said
    with pytest.raises(UserError, match="null byte"):
        make_folder(tmp_path / "a\0b")


def test_a_name_of_255_bytes_can_be_written_and_a_longer_one_is_refused_first(tmp_path):
    write_text(tmp_path / ("x" * 255), "all of it")
    with pytest.raises(UserError, match="name is too long"), atomic_folder(tmp_path / ("y" * 256)):
        pytest.fail("work for nothing")


@pytest.mark.parametrize(
    "command", ["train {out} --data {data}", "prepare {text} --out {out}", "report {run} --out {out}"]
)
def test_commands_say_in_one_line_that_out_cannot_be_written(command, tmp_path, capsys, runs_folder, data_folder):
    for out in ("/proc/nothing", str(tmp_path / "file" / "below")):
        (tmp_path / "file").write_text("")
        given = {"out": out, "data": data_folder, "run": runs_folder / "crate", "text": Path(__file__).parent}
        with pytest.raises(SystemExit) as ended:
            run_and_exit(command.format(**given).split())
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.strip().splitlines()[-1].startswith("cratescope: ")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOTDIR, errno.EIO, errno.EBUSY])
def test_errors_of_the_system_are_said_in_words(number, monkeypatch, capsys):
    def fails(_):
        raise OSError(number, os.strerror(number), "/disk/run/a.json")

    monkeypatch.setattr("cratescope.cli.run", fails)
    with pytest.raises(SystemExit) as ended:
        run_and_exit([])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("cratescope: /disk/run/a.json: ")
    assert unusable(FileNotFoundError(errno.ENOENT, "no such file", "a")) is None  # that is a bug of ours
