"""Exchange: records that leave and come back are the same, and what is no record is refused by file and field."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cratescope.errors import UserError
from cratescope.exchange.config import ExportConfig, ImportConfig
from cratescope.exchange.export import export
from cratescope.exchange.imports import IMPORTED, TokenTexts, import_records
from cratescope.explain.controls import OWN
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained
from cratescope.explain.simulate import simulate
from cratescope.files import read_json
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.records import (
    Moments,
    NeuronId,
    NeuronRecord,
    Stratum,
    Window,
    layer_file,
    read_records,
    write_records,
)
from cratescope.run import Run
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score
from cratescope.text.shards import TokenData
from cratescope.text.tokenizer import EOS, load_tokenizer, token_strings
from fake_run import fake_tokenizer
from kept_files import read_scores
from scripted import ScriptedLLM
from test_explain import N_NEURONS, first_word, make_run, settings_for
from test_simulate import config_for, knowing

PYTHON = os.environ.get("AUTOMATED_INTERPRETABILITY_PYTHON", "")


def exported(run: Run, out: Path, **changes: Any) -> Path:
    return export(ExportConfig(run.root, out, **changes))


@pytest.fixture
def odd_run(tmp_path: Path) -> Run:
    """Two neurons, 3 and 70, with all that a NeuronRecord can hold; the second is constant."""
    run = make_run(tmp_path / "odd", layers=())
    fake_tokenizer().save_pretrained(run.model)
    rng = np.random.default_rng(0)

    def window(place: int, width: int = 9) -> Window:
        tokens = rng.integers(0, len(fake_tokenizer()), width)
        return Window(tokens, rng.normal(size=width).astype(np.float32), place, 0, width // 2)

    windows = [window(place) for place in range(12)]
    bounds = [min(float(one.activations.min()) for one in windows), 0.1, 0.25, 1 / 3, 1.5]
    bounds.append(max(float(one.activations.max()) for one in windows))
    strata = tuple(Stratum(low, high, (windows[i],)) for i, (low, high) in enumerate(zip(bounds, bounds[1:])))  # noqa: B905
    moments = Moments(1000, 0.1, 2.0, -0.5, 1e-7 + 3, bounds[-1])
    first = NeuronRecord(NeuronId("odd", "codes", 2, 3), tuple(windows[5:9]), tuple(windows[9:]), moments, 0.5, strata)
    silent = Window(windows[0].tokens, np.zeros(9, np.float32), 0, 0, 4)
    constant = Moments(1000, 0.0, 0.0, None, None, 0.0)
    second = NeuronRecord(NeuronId("odd", "codes", 2, 70), (), (silent,), constant, 0.0)
    write_records(layer_file(run.records("codes"), 2), [first, second])
    return run


def texts(run: Run, window: Window) -> list[str]:
    return token_strings(load_tokenizer(run.model), window.tokens.tolist())


def test_exported_records_come_back_the_same(odd_run: Run, tmp_path: Path) -> None:
    folder = import_records(ImportConfig(exported(odd_run, tmp_path / "json"), tmp_path / "back"))
    back = Run(tmp_path / "back")
    assert folder == back.records(IMPORTED)
    before, after = read_records(layer_file(odd_run.records("codes"), 2)), read_records(layer_file(folder, 2))
    assert list(after) == [3, 70]
    for index, record in before.items():
        found = after[index]
        assert found.neuron == NeuronId("back", IMPORTED, 2, index)
        for name in ("mean", "variance", "skewness", "kurtosis", "maximum"):
            assert getattr(found.moments, name) == getattr(record.moments, name), name
        assert [(s.low, s.high) for s in found.by_quantile] == [(s.low, s.high) for s in record.by_quantile]
        groups = [(record.top, found.top), (record.random, found.random)]
        groups += [(a.windows, b.windows) for a, b in zip(record.by_quantile, found.by_quantile, strict=True)]
        for mine, theirs in groups:
            for a, b in zip(mine, theirs, strict=True):
                assert a.activations.tobytes() == b.activations.tobytes()
                assert texts(odd_run, a) == texts(back, b)
    assert after[3].top[0].peak == after[3].top[0].activations.argmax()
    assert len({window.key for window in after[3].top + after[3].random}) == 7
    assert not after[3].dead and math.isnan(after[3].density) and after[70].dead


def test_an_import_exported_again_is_the_same_file(odd_run: Run, tmp_path: Path) -> None:
    first = exported(odd_run, tmp_path / "json")
    import_records(ImportConfig(first, tmp_path / "back"))
    second = exported(Run(tmp_path / "back"), tmp_path / "again")
    for name in ("2/3.json", "2/70.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_imported_records_are_explained_simulated_and_scored_like_their_originals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    source = exported(run, tmp_path / "json", layers=(1,))
    (source / "1" / "5.json").unlink()  # neurons made elsewhere need not be all of a layer
    import_records(ImportConfig(source, tmp_path / "back"))
    results = {}
    for one in (run, Run(tmp_path / "back")):
        explain(settings_for(one), ScriptedLLM(first_word))
        simulate(config_for(one), knowing())
        site = "codes" if one is run else IMPORTED
        found = dict(Explained(one, site, "scripted", "top").explanations.all())
        score(ScoreConfig(one.root, explainer="scripted"))
        rows = read_scores(one.scores(site, "scripted", "list-pmi"))
        results[site] = (
            {neuron.index: item.text for neuron, item in found.items() if neuron.layer == 1},
            {(r.neuron.index, r.protocol): r.value for r in rows if r.neuron.layer == 1 and r.control == OWN},
        )
    original, imported = results["codes"], results[IMPORTED]
    assert imported[0].keys() == set(range(N_NEURONS)) - {5}
    assert imported[0] == {index: text for index, text in original[0].items() if index != 5}
    assert imported[1] == {key: value for key, value in original[1].items() if key[0] != 5}
    assert imported[1][0, "top-and-random"] == pytest.approx(1.0)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=12, unique=True))
def test_any_text_can_be_a_token(strings: list[str]) -> None:
    texts = TokenTexts()
    ids = [texts.id(text, Path("a file")) for text in strings]
    assert token_strings(texts.tokenizer(), [0, *ids]) == [EOS, *strings]


def test_bytes_that_are_no_text_become_the_replacement_character(odd_run: Run, tmp_path: Path) -> None:
    out = exported(odd_run, tmp_path / "json")
    found = read_json(out / "2" / "3.json")
    shown = {token for window in found["random_sample"] for token in window["tokens"]}
    shown |= {t for sample in found["random_sample_by_quantile"] for window in sample for t in window["tokens"]}
    shown |= {token for window in found["most_positive_activation_records"] for token in window["tokens"]}
    assert {"\n", "\t", "\ufffd"} & shown and not any(token.startswith("Ġ") for token in shown)


def good_file(tmp_path: Path) -> Path:
    """A folder with one good record, 0/4.json."""
    window = {"tokens": [" a", "b"], "activations": [0.5, 1]}
    row = {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {"dataclass_name": "NeuronId", "layer_index": 0, "neuron_index": 4},
        "random_sample": [window, window],
        "most_positive_activation_records": [window],
    }
    path = tmp_path / "source" / "0" / "4.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row))
    return path


def test_another_format_is_a_module_that_finds_files_and_reads_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "7.txt").write_text("a\ud83d c", errors="surrogatepass")

    def read(paths: Sequence[Path], model: str, texts: TokenTexts) -> Iterator[tuple[int, list[NeuronRecord]]]:
        words = paths[0].read_text(errors="surrogatepass").split(" ")
        ids = np.array([texts.id(word, paths[0]) for word in words])
        window = Window(ids, np.array([0, 1], np.float32), 0, 0, 1)
        moments = Moments(0, math.nan, math.nan, None, None, 1.0)
        yield 3, [NeuronRecord(NeuronId(model, IMPORTED, 3, 7), (window,), (), moments, math.nan)]

    found = [tmp_path / "source" / "7.txt"]
    module = types.SimpleNamespace(files=lambda source: (found, {"b.txt": "empty"}), read=read)
    monkeypatch.setitem(sys.modules, "cratescope.exchange.words", module)
    config = ImportConfig(tmp_path / "source", tmp_path / "run", format="words")  # type: ignore[arg-type]
    folder = import_records(config)
    record = read_records(layer_file(folder, 3))[7]
    assert texts(Run(tmp_path / "run"), record.top[0]) == ["a\ufffd", "c"]
    manifest = read_json(folder / "manifest.json")
    assert (manifest["identity"]["imported"], manifest["invalid_utf8"]) == ("words", 1)
    said = " ".join(capsys.readouterr().err.split())
    assert "left out: b.txt (empty)" in said and "1 tokens had invalid UTF-8" in said


def test_a_record_with_required_fields_alone_is_read(tmp_path: Path) -> None:
    path = good_file(tmp_path)
    folder = import_records(ImportConfig(path.parents[1], tmp_path / "run"))
    record = read_records(layer_file(folder, 0))[4]
    assert record.by_quantile == () and math.isnan(record.moments.mean) and record.moments.maximum == 1.0
    again = exported(Run(tmp_path / "run"), tmp_path / "again") / "0" / "4.json"
    assert (read_json(again)["mean"], read_json(again)["random_sample_by_quantile"]) == (None, None)


def bad(window: Any) -> dict[str, Any]:
    return {"random_sample": [{"tokens": ["x"], "activations": [1]}, window]}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dataclass_name": "NeuronSimulationResults"}, "not a NeuronRecord"),
        ({"neuron_id": None}, "neuron_id"),
        ({"neuron_id": {"layer_index": 0, "neuron_index": True}}, "neuron_id"),
        ({"neuron_id": {"layer_index": 1, "neuron_index": 4}}, "rename it 1/4.json"),
        ({"most_positive_activation_records": None}, "most_positive_activation_records is missing"),
        ({"random_sample": {}}, "random_sample is missing or not a list"),
        (bad({"tokens": ["a", "b"], "activations": [1]}), r"random_sample\[1\]: 2 tokens and 1 activations"),
        (bad({"tokens": ["a"]}), "1 tokens and no activations"),
        (bad({"activations": [1]}), r"random_sample\[1\].tokens"),
        (bad({"tokens": [7], "activations": [1]}), r"random_sample\[1\].tokens"),
        (bad({"tokens": [], "activations": []}), r"random_sample\[1\].tokens"),
        (bad("x"), r"random_sample\[1\].tokens"),
        (bad({"tokens": ["a"], "activations": [math.nan]}), r"random_sample\[1\].activations\[0\] is nan"),
        (bad({"tokens": ["a"], "activations": [1e39]}), r"activations\[0\] is 1e\+39"),
        (bad({"tokens": ["a"], "activations": ["1"]}), r"activations\[0\] is '1'"),
        ({"mean": math.inf}, "mean is inf"),
        ({"kurtosis": math.nan}, "kurtosis is nan"),
        ({"random_sample_by_quantile": [[], []], "quantile_boundaries": [1, 2]}, "2 quantile_boundaries for 2 samples"),
        ({"random_sample_by_quantile": [[], 3]}, r"random_sample_by_quantile\[1\] is missing or not a list"),
        ({"random_sample": "text"}, "random_sample is missing or not a list"),
        ({"neuron_id": {"layer_index": 0}}, "neuron_id"),
        ({"neuron_id": {"layer_index": -1, "neuron_index": 4}}, "rename it -1/4.json"),
        ({"neuron_id": {"layer_index": 0, "neuron_index": 4.0}}, "neuron_id"),
        (bad({"tokens": ["a", "b"], "activations": [1, True]}), r"activations\[1\] is True"),
        (bad({"tokens": ["a"], "activations": [-math.inf]}), r"activations\[0\] is -inf"),
        (bad({"tokens": ["a"], "activations": [10**400]}), r"activations\[0\] is 1000000000.*\.\.\."),
        (bad({"tokens": ["a"], "activations": [None]}), r"activations\[0\] is None"),
        (bad({"tokens": ["a"], "activations": [[1] * 999]}), r"activations\[0\] is \[1, 1, 1, 1, 1, 1, \.\.\.\]"),
        (bad({"tokens": [None], "activations": [1]}), r"random_sample\[1\].tokens"),
        ({"variance": "1"}, "variance is '1'"),
        ({"variance": -1.0}, "variance is -1.0, below 0"),
        ({"random_sample_by_quantile": [[]] * 2, "quantile_boundaries": [True]}, r"quantile_boundaries\[0\] is True"),
    ],
)
def test_a_bad_record_is_refused_by_file_and_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    path = good_file(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=field) as caught:
        import_records(ImportConfig(path.parents[1], tmp_path / "run"))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.*"))


def test_what_is_no_json_or_not_named_as_a_neuron_is_refused(tmp_path: Path) -> None:
    path = good_file(tmp_path)
    damaged = (b"{", b"\xff", b"", b"\x00", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 10**5, "{".encode("utf-16"))
    for content, words in ((b"[1]", "not a NeuronRecord"), *((content, "not valid JSON") for content in damaged)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            import_records(ImportConfig(path.parents[1], tmp_path / "run"))
    for name in ("04.json", "\u0664.json"):
        path = path.rename(path.with_name(name))
        with pytest.raises(UserError, match=f"{name}: not named"):
            import_records(ImportConfig(path.parents[1], tmp_path / "run"))
    path = path.rename(path.with_name(f"{2**31}.json"))
    with pytest.raises(UserError, match="have to be below 2,147,483,648"):
        import_records(ImportConfig(path.parents[1], tmp_path / "run"))
    path.unlink()
    path.touch()
    path.rename(path.with_name("notes.json"))
    with pytest.raises(UserError, match="notes.json: not named"):
        import_records(ImportConfig(path.parents[1], tmp_path / "run"))
    with pytest.raises(UserError, match="no files"):
        import_records(ImportConfig(tmp_path / "none", tmp_path / "run"))


def test_an_import_says_what_it_leaves_out_and_follows_no_link_out_of_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = good_file(tmp_path)
    source, outside = path.parents[1], tmp_path / "outside.json"
    outside.write_text(path.read_text().replace('"neuron_index": 4', '"neuron_index": 5'))
    (path.parent / "5.json").symlink_to(outside)
    (path.parent / "6.json.gz").touch()
    (source / "index.json").touch()
    path.rename(path.with_suffix(".JSON"))
    folder = import_records(ImportConfig(source, tmp_path / "run"))
    assert list(read_records(layer_file(folder, 0))) == [4]
    said = " ".join(capsys.readouterr().err.split())
    for left_out in (
        "0/5.json (a link that leads out of the folder)",
        "0/6.json.gz (unknown kind)",
        "index.json (not in a layer's folder)",
    ):
        assert left_out in said
    shutil.copy(path.with_suffix(".JSON"), path)
    with pytest.raises(UserError, match="is the same neuron as 4"):
        import_records(ImportConfig(source, tmp_path / "run"))


def test_halves_of_surrogate_pairs_and_bytes_that_are_no_text_are_replaced_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = good_file(tmp_path)
    window = {"tokens": ["\ud83d", "\ude00b", "c\xe9"], "activations": [1, 2, 10**30]}
    row = json.dumps(json.loads(path.read_text()) | {"random_sample": [window]}).encode()
    path.write_bytes(row.replace(b"c\\u00e9", b"c\xe9"))
    folder = import_records(ImportConfig(path.parents[1], tmp_path / "run"))
    record = read_records(layer_file(folder, 0))[4]
    assert texts(Run(tmp_path / "run"), record.random[0]) == ["\ufffd", "\ufffdb", "c\ufffd"]
    assert read_json(folder / "manifest.json")["invalid_utf8"] == 3
    assert "warning: " in (said := " ".join(capsys.readouterr().err.split())) and "3 tokens had invalid UTF-8" in said
    import_records(ImportConfig(path.parents[1], tmp_path / "run"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_record_of_another_encoding_is_read_by_its_mark(tmp_path: Path, encoding: str) -> None:
    path = good_file(tmp_path)
    path.write_text(path.read_text().replace('" a"', '"é"'), encoding=encoding)
    folder = import_records(ImportConfig(path.parents[1], tmp_path / "run"))
    assert texts(Run(tmp_path / "run"), read_records(layer_file(folder, 0))[4].random[0]) == ["é", "b"]


def test_a_refused_import_or_export_leaves_nothing_behind(odd_run: Run, tmp_path: Path) -> None:
    path, out = good_file(tmp_path), tmp_path / "not/yet/there"
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        import_records(ImportConfig(path.parents[1], out))
    records = layer_file(odd_run.records("codes"), 2)
    records.write_bytes(records.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        exported(odd_run, out)
    assert not (tmp_path / "not").exists()


def test_an_export_of_no_layer_is_refused(odd_run: Run, tmp_path: Path) -> None:
    layer_file(odd_run.records("codes"), 2).unlink()
    with pytest.raises(UserError, match="codes: has no records of any layer"):
        exported(odd_run, tmp_path / "json")


def test_an_import_is_kept_and_never_mixed_with_another(tmp_path: Path) -> None:
    path = good_file(tmp_path)
    config = ImportConfig(path.parents[1], tmp_path / "run")
    written = layer_file(import_records(config), 0)
    stamp = written.stat().st_mtime_ns
    import_records(config)
    assert written.stat().st_mtime_ns == stamp
    path.write_text(path.read_text().replace("0.5", "0.75"))
    with pytest.raises(UserError, match="sha256"):
        import_records(config)
    trained = make_run(tmp_path / "trained")
    with pytest.raises(UserError, match="run of a model"):
        import_records(ImportConfig(path.parents[1], trained.root))


def test_an_export_is_kept_and_never_mixed_with_another(odd_run: Run, tmp_path: Path) -> None:
    out = exported(odd_run, tmp_path / "json")
    (out / "2" / "3.json").unlink()
    stamp = (out / "2" / "70.json").stat().st_mtime_ns
    exported(odd_run, out)
    assert (out / "2" / "3.json").exists() and (out / "2" / "70.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="was made with"):
        exported(make_run(tmp_path / "other", weights=b"other"), out)
    with pytest.raises(UserError, match="--layers 7: no such layer"):
        exported(odd_run, out, layers=(7,))


def test_delphis_files_hold_every_activation_of_the_dump(runs_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "crate")
    shutil.copytree(runs_folder / "crate", run.root, ignore=shutil.ignore_patterns("records"))
    small = {"excerpts": 20, "context": 24, "window": 8, "part": 8, "batch_size": 4, "strata": False, "device": "cpu"}
    collect(CollectConfig(run.root, data=data_folder, dump=True, **small))
    out = exported(run, tmp_path / "delphi", format="delphi", data=data_folder)
    [module] = (out / "latents").iterdir()
    assert module.name == "transformer.h.0.ista.codes"
    config = read_json(module / "config.json")
    assert config["cache_ctx_len"] == 24 and config["n_tokens"] == 20 * 24
    assert load_tokenizer(config["model_name"]).get_vocab() == load_tokenizer(run.model).get_vocab()
    tokens = TokenData.open(data_folder).split("heldout").spaced(20, 24)
    dense = np.zeros((20, 24, 512), np.float32)
    files = sorted(module.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0]))
    assert [path.stem for path in files] == ["0_101", "102_203", "204_306", "307_408", "409_511"]
    for path in files:
        found, first = load_file(path), int(path.stem.split("_")[0])
        assert np.array_equal(found["tokens"], tokens) and found["locations"].dtype == np.uint16
        row, place, neuron = found["locations"].astype(int).T
        dense[row, place, neuron + first] = found["activations"]
    for index, record in read_records(layer_file(run.records("codes"), 0)).items():
        assert record.density == pytest.approx((dense[..., index] != 0).mean())
        for window in record.top[:5] + record.random[:5]:
            inside = slice(window.start, window.start + len(window.tokens))
            assert np.array_equal(dense[window.excerpt, inside, index], window.activations)


def test_delphi_without_a_dump_says_how_to_get_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="cratescope collect .*--dump"):
        exported(run, tmp_path / "delphi", format="delphi")
    assert not (tmp_path / "delphi").exists()


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="AUTOMATED_INTERPRETABILITY_PYTHON names no python that has the package")
def test_exported_records_load_in_automated_interpretability(odd_run: Run, tmp_path: Path) -> None:
    out = exported(odd_run, tmp_path / "json")
    code = f"""
import json
from neuron_explainer.activations.activations import ActivationRecord, NeuronRecord, load_neuron
for neuron in (3, 70):
    record = load_neuron(2, neuron, {out.as_uri()!r})
    assert isinstance(record, NeuronRecord) and record.neuron_id.neuron_index == neuron
    assert all(isinstance(window, ActivationRecord) for window in record.random_sample)
record = load_neuron(2, 3, {out.as_uri()!r})
samples = [[window.activations for window in sample] for sample in record.random_sample_by_quantile]
print(json.dumps([record.max_activation, record.kurtosis, record.quantile_boundaries, samples]))
"""
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = read_records(layer_file(odd_run.records("codes"), 2))[3]
    maximum, kurtosis, boundaries, samples = json.loads(done.stdout)
    assert np.float32(maximum) == max(window.activations.max() for window in record.top)
    assert kurtosis == record.moments.kurtosis and boundaries == [s.low for s in record.by_quantile[1:]]
    found = [np.array(sample, np.float32) for sample in samples]
    assert all((a == s.windows[0].activations).all() for a, s in zip(found, record.by_quantile, strict=True))


def test_a_refused_import_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in" / "0").mkdir(parents=True)
    (tmp_path / "in" / "0" / "0.json").write_text("{}")
    (tmp_path / "out").mkdir()
    for out in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(UserError, match="neuron_id"):
            import_records(ImportConfig(tmp_path / "in", out))
    assert not any((tmp_path / "out").iterdir()) and not (tmp_path / "new").exists()


def test_records_are_not_exported_into_a_run(odd_run: Run) -> None:
    with pytest.raises(UserError, match="is a run directory"):
        export(ExportConfig(odd_run.root, odd_run.root))
