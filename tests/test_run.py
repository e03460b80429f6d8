"""Atomic files, resumable logs and the identity of folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cratescope.errors import UserError
from cratescope.files import atomic_folder, atomic_path, parse_json, read_json, read_jsonl, slug, write_json
from cratescope.run import Run, claim


def test_a_file_whose_writing_fails_is_not_there_and_the_old_one_stays(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", [atomic_path, atomic_folder])
def test_folders_made_for_a_file_or_a_folder_go_again_where_nothing_comes_of_it(make, tmp_path):
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "a/b/c", tmp_path / "there/b/c"):
        with pytest.raises(RuntimeError), make(target):
            raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(RuntimeError), make(tmp_path / "a/b"):
        (tmp_path / "a/other").touch()
        raise RuntimeError
    assert (tmp_path / "a/other").exists()


def test_a_folder_appears_whole_and_replaces_an_older_one(tmp_path):
    target = tmp_path / "model"
    for text in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "one"
    assert (target / "a").read_text() == "two" and list(tmp_path.iterdir()) == [target]


def test_nan_is_never_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"score": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("text", ["{", "", "[" * 10**5, '{"n": ' + "9" * 5000 + "}", '{"a":\n\n}', "\ud800"])
def test_whatever_is_no_json_is_one_line_with_its_place(text):
    with pytest.raises(UserError, match=r"a.json:7: not valid JSON \(.+\); mend it") as caught:
        parse_json(text, "a.json:7", "mend it")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_of_ours_is_named_whatever_ails_it(tmp_path):
    for text in ("[" * 10**5, "9" * 5000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
            read_json(tmp_path / "a.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_no_json_with_what_is_no_number_is_read(number, tmp_path):
    (tmp_path / "a.json").write_text(f'{{"loss": {number}}}\n')
    for read in (read_json, read_jsonl):
        with pytest.raises(UserError, match=f"a.json: .*{number}"):
            read(tmp_path / "a.json")


def test_any_text_is_written_as_json_and_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"name": "caf\udce9 é \ud83d"})
    assert read_json(tmp_path / "a.json") == {"name": "caf\udce9 é \ud83d"}


def test_a_log_cut_short_in_its_last_line_keeps_the_others(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_folder_claimed_for_one_thing_is_refused_to_another(tmp_path):
    claim(tmp_path, {"model": "a", "top": (1, 2)})
    claim(tmp_path, {"model": "a", "top": [1, 2]})
    with pytest.raises(UserError, match="was made with model = 'a', not 'b'"):
        claim(tmp_path, {"model": "b", "top": [1, 2]})
    with pytest.raises(UserError, match="seed = None, not 1"):
        claim(tmp_path, {"model": "a", "top": [1, 2], "seed": 1})


def test_names_of_hub_models_become_one_folder_each():
    assert slug("org/model:Q4") == "org-model-Q4"
    assert slug("../../etc") == "etc"


def test_names_that_look_alike_or_are_long_get_components_of_their_own():
    names = ("模型", "日本", "a b", "a+b", "a b ", "C++", "x" * 300, "x" * 301, "é" * 300, ".", "a\nb", "a\0b")
    found = [slug(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(len(name.encode()) < 200 and not name.startswith(".") and "/" not in name for name in found)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        Run(tmp_path).read_manifest()
    with pytest.raises(UserError, match="finish `cratescope train`"):
        Run(tmp_path).fingerprint()


def make_data(folder: Path, text: str = "ours") -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    return folder


def adopted(data: dict[str, str]) -> dict[str, object]:
    """The least that a run.json says."""
    return {"adopted": "x", "family": "llama", "parameters": 1, "n_layer": 1, "context": None, "data": data}


def make_run(root: Path, data: Path) -> Run:
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "run.json", adopted(Run(root).data_entry(data)))
    return Run(root)


def test_a_run_below_a_link_finds_its_data_by_every_path(tmp_path, monkeypatch):
    work, disk = tmp_path / "work", tmp_path / "disk" / "deep" / "runs"
    data = make_data(work / "data")
    disk.mkdir(parents=True)
    (work / "runs").symlink_to(disk)
    make_run(work / "runs" / "a", data)
    monkeypatch.chdir(work)
    for root in (work / "runs" / "a", disk / "a", Path("runs/a")):
        assert Run(root).data_path().samefile(data)


def test_a_run_made_before_with_the_path_as_given_still_finds_its_data(tmp_path):
    data, disk = make_data(tmp_path / "work" / "data"), tmp_path / "disk" / "deep" / "runs"
    (disk / "a").mkdir(parents=True)
    (tmp_path / "work" / "runs").symlink_to(disk)
    write_json(disk / "a" / "run.json", adopted({"path": "../../data", "manifest_sha256": "other"}))
    assert Run(tmp_path / "work" / "runs" / "a").data_path().samefile(data)


@pytest.mark.parametrize("linked", [False, True])
def test_a_run_and_its_data_can_be_moved_together(linked, tmp_path):
    place = tmp_path / "elsewhere" / "data" if linked else tmp_path / "one" / "data"
    make_data(place)
    if linked:
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "data").symlink_to(place)
    make_run(tmp_path / "one" / "runs" / "a", tmp_path / "one" / "data")
    (tmp_path / "other" / "deep").mkdir(parents=True)
    shutil.move(tmp_path / "one", tmp_path / "other" / "deep" / "two")
    assert (
        Run(tmp_path / "other" / "deep" / "two" / "runs" / "a")
        .data_path()
        .samefile(tmp_path / "other" / "deep" / "two" / "data")
    )


def test_of_two_data_folders_the_one_the_run_was_made_with_is_taken(tmp_path):
    disk = tmp_path / "work" / "disk" / "runs"
    ours, other = make_data(tmp_path / "work" / "data"), make_data(tmp_path / "work" / "disk" / "data", "other")
    disk.mkdir(parents=True)
    (tmp_path / "work" / "runs").symlink_to(disk)
    run = make_run(tmp_path / "work" / "runs" / "a", ours)
    entry = json.loads(run.manifest.read_text())["data"]
    write_json(run.manifest, adopted(entry | {"path": "../../data"}))
    assert (disk / "a" / "../../data").samefile(other) and run.data_path().samefile(ours)
