"""Atomic files, resumable logs and the identity of folders."""

from __future__ import annotations

import pytest

from cratescope.run import Run, UserError, atomic_folder, atomic_path, claim, read_json, read_jsonl, slug, write_json


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
