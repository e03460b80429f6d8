"""Files that a disk, a kill or a hand has damaged: noticed, and named in one line with the fix."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from cratescope.errors import UserError
from cratescope.explain.explained import Explained
from cratescope.files import WHOLE, mark_whole, misfit, read_json, write_json
from cratescope.llm.config import LLMConfig
from cratescope.llm.local import LocalLLM
from cratescope.lm.checkpoints import last_whole_checkpoint
from cratescope.lm.config import EvaluateConfig
from cratescope.lm.evaluate import evaluate
from cratescope.lm.load import load_model
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.records import SCHEMA, layer_file, read_records
from cratescope.neurons.sample import draw_neurons
from cratescope.report.config import ReportConfig
from cratescope.report.report import report
from cratescope.results.runs import load_results
from cratescope.run import Run
from cratescope.text.shards import TokenData
from cratescope.text.tokenizer import load_tokenizer
from fake_run import Fake, fake_run, fake_tokenizer
from kept_files import flip


def refused(action):
    """The one line of the UserError; None when the action works."""
    try:
        action()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return str(error)
    return None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("damage") / "crate", Fake(neurons=3))


def test_no_flipped_bit_of_a_records_file_gives_other_numbers(run, tmp_path):
    path = tmp_path / "layer-00.parquet"
    whole = layer_file(run.records("codes"), 0).read_bytes()
    for bit in range(5, 8 * len(whole), 8 * len(whole) // 150):
        path.write_bytes(whole)
        flip(path, bit)
        for read in (lambda: read_records(path), lambda: read_records(path, [1], strata=())):
            assert "layer-00.parquet: damaged" in (refused(read) or ""), bit
    for data in (b"", bytes(len(whole)), whole[: len(whole) // 2], whole[:-1], b"PAR1", whole[:4] + whole, b"{}"):
        path.write_bytes(data)
        assert "layer-00.parquet: damaged" in (refused(lambda: draw_neurons(path, 0, 0)) or "")


def test_records_are_parquet_for_others_and_those_of_before_are_read_without_a_checksum(run, tmp_path):
    ours = layer_file(run.records("codes"), 0)
    table = pq.read_table(ours, page_checksum_verification=True)
    old = tmp_path / "layer-00.parquet"
    pq.write_table(table.cast(SCHEMA.remove_metadata()), old, compression="zstd", use_dictionary=False)
    assert [*read_records(old)] == [*read_records(ours)]
    np.testing.assert_array_equal(read_records(old)[1].top[0].activations, read_records(ours)[1].top[0].activations)
    pq.write_table(table, old)  # says that it has a checksum
    with pytest.raises(UserError, match="its checksum is gone"):
        read_records(old)


@pytest.fixture
def trained(runs_folder, data_folder, tmp_path):
    """A copy of a trained run that can be damaged."""
    shutil.copytree(runs_folder / "crate", tmp_path / "crate")
    manifest = read_json(tmp_path / "crate" / "run.json")
    manifest["data"]["path"] = str(data_folder)
    write_json(tmp_path / "crate" / "run.json", manifest)
    return Run(tmp_path / "crate")


def test_a_flipped_bit_in_a_models_folder_is_named_by_whatever_reads_it(trained):
    load_model(trained, "cpu")
    assert not misfit(read_json(trained.model / WHOLE), {str: str})
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        path = trained.model / name
        size = 8 * path.stat().st_size
        for bit in (size // 2 + 3, size - 20):
            flip(path, bit)
            readers = [trained.fingerprint, lambda: load_model(trained, "cpu")]
            readers += [lambda: evaluate(EvaluateConfig(trained.root)), lambda: collect(CollectConfig(trained.root))]
            readers += [lambda: load_tokenizer(trained.model)] if name != "model.safetensors" else []
            for read in readers:
                said = refused(read) or ""
                assert f"{path}: damaged" in said and "copy it again" in said, (name, bit)
            flip(path, bit)
    load_model(trained, "cpu")


def test_a_model_without_checksums_is_read_and_damage_that_the_library_meets_is_one_line(trained):
    (trained.model / WHOLE).unlink()
    load_model(trained, "cpu")
    config, weights = trained.model / "config.json", trained.model / "model.safetensors"
    stated = read_json(config)
    for path, contents in {
        config: [b"", b"\0" * 900, b"[]", b'"crate"', b"{}", b"\xff\xfe\0", b'{"model_type": 3}', b"[" * 90_000],
        weights: [b"", b"\0" * 90, weights.read_bytes()[:-9], b"\xff" * 90, b"PK\3\4"],
    }.items():
        whole = path.read_bytes()
        for data in contents:
            path.write_bytes(data)
            assert str(trained.model) in (refused(lambda: load_model(trained, "cpu")) or ""), (path, data[:20])
        path.write_bytes(whole)
    for name, value in {"n_head": 0, "n_embd": "64", "n_layer": -1, "vocab_size": None, "n_positions": [1]}.items():
        write_json(config, stated | {name: value})
        assert str(trained.model) in (refused(lambda: load_model(trained, "cpu")) or ""), name
    write_json(config, stated)
    for data in (b"", b"[]", b"{}", b"\0" * 50, b'{"model": {"type": "BPE"}}', b"\xff"):
        (trained.model / "tokenizer.json").write_bytes(data)
        assert "tokenizer" in (refused(lambda: load_tokenizer(trained.model)) or ""), data


def test_an_llm_with_damaged_files_is_one_line(runs_folder, tmp_path):
    folder = tmp_path / "llm"
    shutil.copytree(runs_folder / "gpt2" / "model", folder)
    weights = folder / "model.safetensors"

    def llm():
        return LocalLLM.open(LLMConfig(llm=str(folder), llm_device="cpu"))

    assert refused(llm) is None
    for path in (weights, folder / "config.json", folder / "tokenizer.json"):
        whole = path.read_bytes()
        for data in (b"", whole[: len(whole) // 2], b"\0" * 100, b"[1]"):
            path.write_bytes(data)
            assert (refused(llm) or "").startswith(f"--llm {folder}: cannot load it"), (path, data[:9])
        path.write_bytes(whole)
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    gone = next(name for name in tensors if name.endswith("c_fc.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, weights, {"format": "pt"})
    assert f"has no {gone}" in (refused(llm) or "")


def test_a_flipped_bit_in_the_data_is_found_though_size_and_time_stay(data_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(data_folder, data)
    TokenData.open(data).split("train")
    flip(data / "train-00000.npy", 8 * 200 + 3)
    with pytest.raises(UserError, match=r"train-00000\.npy: damaged \(SHA-256 differs\)"):
        TokenData.open(data).split("train")
    flip(data / "tokenizer" / "tokenizer.json", 8 * 999)
    with pytest.raises(UserError, match=r"tokenizer\.json: damaged"):
        _ = TokenData.open(data).tokenizer
    whole = json.loads((data / "manifest.json").read_text())
    wrong = [[], {}, {"splits": []}, whole | {"dtype": "object"}, whole | {"splits": {"train": {"shards": "x"}}}]
    for value in (*wrong, whole | {"tokenizer": {"vocab_size": "320", "eos_id": 0}}):
        write_json(data / "manifest.json", value)
        assert str(data) in (refused(lambda: TokenData.open(data)) or ""), value
    for seals in (b"", b"[1]", b"\0\0", b'{"validation-00000.npy": 7}'):
        write_json(data / "manifest.json", whole)
        (data / ".verified.json").write_bytes(seals)
        TokenData.open(data).split("validation")


JSON_DAMAGE = [b"", b"\0" * 64, b"\xff\xfe\0\1", b'{"neuron": ', b"[]", b"{}", b"7", b'"a"', b"null"]
JSON_DAMAGE += [b"[" * 90_000, b"9" * 5000]


def test_a_damaged_file_of_results_is_named(run):
    config = ReportConfig((run.root,), run.root / "report")
    scores = run.scores("codes", "offline", "list-pmi")
    files = [run.manifest, run.evaluation, scores / "scores.json", run.quality("codes")]
    for path in files:
        whole = path.read_bytes()
        retyped = [b'{"neuron": 1}', json.dumps({name: "x" for name in json.loads(whole)}).encode()]
        value = json.loads(whole)
        gone = next(name for name in ("loss", "data", "made_with", "neurons") if name in value)
        less = json.dumps({name: item for name, item in value.items() if name != gone}).encode()
        for data in (*JSON_DAMAGE, *retyped, less):
            path.write_bytes(data)
            said = refused(lambda: load_results(config.runs)) or ""
            assert said.startswith(str(path)) and ("again" in said or "cratescope" in said), (path, data[:30], said)
        path.write_bytes(whole)
    whole = run.metrics.read_bytes()
    first = whole.splitlines(keepends=True)[0]
    begun = (b"[]\n", b"{}\n", b"null\n", first[:20] + b"\n")
    for data in (b"\0" * 64, b"\xff\xfe\0\1", *(line + whole for line in begun)):
        run.metrics.write_bytes(data)
        assert str(run.metrics) in (refused(lambda: load_results(config.runs)) or ""), data[:30]
    run.metrics.write_bytes(whole)
    load_results(config.runs)


def test_a_damaged_table_of_results_is_named(run):
    config = ReportConfig((run.root,), run.root / "report")
    tables = {
        "score": run.scores("codes", "offline", "list-pmi"),
        "explain": Explained(run, "codes", "offline", "top").explanations.folder,
        "simulate": Explained(run, "codes", "offline", "top").simulations("list-pmi").folder,
    }
    for stage, folder in tables.items():
        path = layer_file(folder, 1)
        whole = path.read_bytes()
        for data in (*JSON_DAMAGE, whole[: len(whole) // 2], whole[:-1], whole[4:], whole + b"\n"):
            path.write_bytes(data)
            said = refused(lambda: report(config, fake_tokenizer())) or ""
            assert said.startswith(f"{path}: damaged") and f"`cratescope {stage}` again" in said, (
                path,
                data[:30],
                said,
            )
        path.write_bytes(whole)
    load_results(config.runs)


MARKS = [b"[]", b"{}", b"\xff", b"\0" * 9, b'{"model.safetensors": 3}', b'{"": "0"}', b'{"a\\u0000": "0"}']


@pytest.mark.parametrize("mark", MARKS)
def test_a_checkpoint_with_a_damaged_mark_is_not_used(tmp_path, mark):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        mark_whole(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-x").write_text("no checkpoint")
    (tmp_path / "checkpoint-3").write_text("no folder")
    (tmp_path / "checkpoint-2" / WHOLE).write_bytes(mark)
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-1"
