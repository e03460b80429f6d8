"""A checkpoint is used when all of it is there and nothing else is."""

from __future__ import annotations

import pytest

from cratescope.files import WHOLE, mark_whole
from cratescope.lm.checkpoints import last_whole_checkpoint, rotate


def checkpoints(folder, *steps):
    for step in steps:
        (folder / f"checkpoint-{step}" / "part").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "part" / "model.safetensors").write_bytes(b"12345678")
        mark_whole(folder / f"checkpoint-{step}")


def cut_short(folder):
    (folder / "part" / "model.safetensors").write_bytes(b"123")


def changed_in_place(folder):
    (folder / "part" / "model.safetensors").write_bytes(b"12345679")


def without_a_file(folder):
    (folder / "part" / "model.safetensors").unlink()


def never_finished(folder):
    (folder / WHOLE).unlink()


def with_half_a_mark(folder):
    (folder / WHOLE).write_text('{"part')


@pytest.mark.parametrize("damage", [cut_short, changed_in_place, without_a_file, never_finished, with_half_a_mark])
def test_the_checkpoint_before_a_damaged_one_is_used_with_a_warning(tmp_path, capsys, damage):
    checkpoints(tmp_path, 2, 10, 9)
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-10"
    assert not capsys.readouterr().err
    damage(tmp_path / "checkpoint-10")
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-9"
    assert "checkpoint-10 was cut short or is damaged" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "checkpoint-10").exists()


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    checkpoints(tmp_path, 1)
    never_finished(tmp_path / "checkpoint-1")
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_the_newest_checkpoints_are_kept_by_number_not_by_age(tmp_path):
    checkpoints(tmp_path, 100, 20, 3)
    rotate(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]
