"""The pass over a model's text: its records, parts, workers, resuming, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

import processes
from cratescope.errors import UserError
from cratescope.models.presets import build
from cratescope.neurons import collect as module
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.records import NeuronId, layer_file, read_records
from cratescope.neurons.sites import Site, read_site, site_named
from cratescope.neurons.steer import Edit, steered
from cratescope.neurons.tensors import load_tensors
from cratescope.text.shards import TokenData

SMALL = {
    "excerpts": 40,
    "context": 24,
    "window": 8,
    "top": 6,
    "random": 6,
    "part": 16,
    "batch_size": 4,
    "tokens": 50,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def collected(runs_folder):
    return {family: collect(CollectConfig(runs_folder / family, **SMALL)) for family in ("crate", "gpt2")}


@pytest.mark.parametrize("family", ["crate", "gpt2"])
def test_records_hold_what_the_model_does_on_their_text(collected, runs_folder, data_folder, family):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs_folder / family / "model")
    excerpts = TokenData.open(data_folder).split("heldout").spaced(SMALL["excerpts"], SMALL["context"])
    record = read_records(layer_file(collected[family], 0), [5])[5]
    assert record.neuron == NeuronId(family, {"crate": "codes", "gpt2": "mlp"}[family], 0, 5)
    with torch.no_grad(), read_site(model, site_named("auto", model), [0]) as found:
        model(torch.from_numpy(excerpts))
    for one in record.top[:3] + record.random:
        window = slice(one.start, one.start + len(one.tokens))
        assert np.array_equal(excerpts[one.excerpt, window], one.tokens)
        assert np.allclose(found[0][one.excerpt, window, 5].numpy(), one.activations, atol=1e-5)
    assert record.moments.mean == pytest.approx(found[0][..., 5].mean().item(), rel=1e-4)


def test_records_read_in_pandas_in_one_line(collected):
    table = pandas.read_parquet(layer_file(collected["crate"], 0))
    assert len(table) == 512 and {"layer", "index", "density", "top", "random"} <= set(table.columns)


@pytest.fixture
def run_of_one(runs_folder, tmp_path):
    """A copy of the CRATE run without its records."""
    shutil.copytree(runs_folder / "crate", tmp_path / "crate", ignore=shutil.ignore_patterns("records"))
    return tmp_path / "crate"


def part_of(run, part):
    return run / "records" / "codes" / ".parts" / "layer-00" / f"part-{part:05d}.safetensors"


def read_parts(monkeypatch, stop_before=None):
    """Note which parts are read from now on; one of them may end the process."""
    read, read_part = [], module.Pass._read_part

    def noting(self, part, statistics):
        if part == stop_before:
            raise KeyboardInterrupt
        read.append(part)
        read_part(self, part, statistics)

    monkeypatch.setattr(module.Pass, "_read_part", noting)
    return read


def test_parts_of_another_layout_are_read_anew(run_of_one, data_folder, collected, monkeypatch):
    config = CollectConfig(run_of_one, data=data_folder, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("cratescope.neurons.tensors.LAYOUT", 0)
        read_parts(patch, stop_before=2)
        with pytest.raises(KeyboardInterrupt):
            collect(config)
    read = read_parts(monkeypatch)
    assert layer_file(collect(config), 0).read_bytes() == layer_file(collected["crate"], 0).read_bytes()
    assert read == [0, 1, 2]


def test_a_kill_between_parts_loses_no_whole_part_and_changes_no_byte(run_of_one, data_folder, collected, monkeypatch):
    config = CollectConfig(run_of_one, data=data_folder, **SMALL)
    with monkeypatch.context() as patch:
        read_parts(patch, stop_before=2)
        with pytest.raises(KeyboardInterrupt):
            collect(config)
    part_of(run_of_one, 0).write_bytes(part_of(run_of_one, 0).read_bytes()[:-1] + b"?")
    read = read_parts(monkeypatch)
    folder = collect(config)
    assert read == [0, 2]  # the damaged one and the one not read
    assert layer_file(folder, 0).read_bytes() == layer_file(collected["crate"], 0).read_bytes()
    assert not (folder / ".parts").exists()


@pytest.mark.slow  # test_kills.py kills this stage at other moments
def test_killed_in_mid_part_a_run_resumes_to_the_same_bytes(run_of_one, data_folder, collected):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    process = processes.start(["collect", str(run_of_one), f"--data={data_folder}", *options])
    processes.kill_when(process, part_of(run_of_one, 0).exists)
    folder = collect(CollectConfig(run_of_one, data=data_folder, **SMALL))
    assert layer_file(folder, 0).read_bytes() == layer_file(collected["crate"], 0).read_bytes()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_workers_write_what_one_would(run_of_one, data_folder, collected, order, capsys):
    for worker in order:
        folder = collect(CollectConfig(run_of_one, data=data_folder, worker=f"{worker}/3", **SMALL))
    assert layer_file(folder, 0).read_bytes() == layer_file(collected["crate"], 0).read_bytes()
    assert "worker 0: done" in capsys.readouterr().err


def test_torchrun_names_the_workers(run_of_one, data_folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    read = read_parts(monkeypatch)
    collect(CollectConfig(run_of_one, data=data_folder, **SMALL))
    assert read == [1]


def test_batches_change_nothing_but_rounding_and_layers_may_come_later(run_of_one, data_folder, collected):
    changed = SMALL | {"batch_size": 7}
    folder = collect(CollectConfig(run_of_one, data=data_folder, layers=(0,), **changed))
    sample = range(0, 512, 73)
    ours, theirs = (read_records(layer_file(f, 0), sample) for f in (folder, collected["crate"]))
    for index in sample:
        assert [w.key for w in ours[index].random] == [w.key for w in theirs[index].random]
        assert ours[index].moments.mean == pytest.approx(theirs[index].moments.mean, rel=1e-5)


def test_a_full_disk_says_what_is_kept(run_of_one, data_folder, monkeypatch):
    save = module.save_tensors

    def full(path, tensors, **how):
        if path.name == "part-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, tensors, **how)

    monkeypatch.setattr(module, "save_tensors", full)
    with pytest.raises(UserError, match="disk full.* keeps 1 of 3 parts"):
        collect(CollectConfig(run_of_one, data=data_folder, **SMALL))


def test_the_dump_holds_every_non_zero_activation(run_of_one, data_folder, collected, monkeypatch):
    folder = collect(CollectConfig(run_of_one, data=data_folder, dump=True, **SMALL))
    parts = [load_tensors(folder / "dump" / "layer-00" / f"part-{part:05d}.safetensors") for part in range(3)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert len(joined["counts"]) == 40 * 24 and joined["counts"].sum() == len(joined["values"])
    for index, record in read_records(layer_file(folder, 0), range(0, 512, 73)).items():
        values = joined["values"][joined["neurons"] == index]
        assert len(values) == round(record.density * 960) and values.sum().item() / 960 == pytest.approx(
            record.moments.mean, rel=1e-4, abs=1e-8
        )
    assert layer_file(folder, 0).read_bytes() == layer_file(collected["crate"], 0).read_bytes()


def test_a_dump_too_large_for_the_disk_is_refused(run_of_one, data_folder, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(UserError, match=r"--dump needs about 0\.0 GB and .* has 0\.0 GB free"):
        collect(CollectConfig(run_of_one, data=data_folder, dump=True, **SMALL))


def test_a_model_trained_elsewhere_is_collected_and_kept_apart(data_folder, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaConfig(vocab_size=384, max_position_embeddings=32, **shape)
    build(llama, 0).save_pretrained(tmp_path / "llama")
    TokenData.open(data_folder).tokenizer.save_pretrained(tmp_path / "llama")
    config = CollectConfig(tmp_path / "run", model=str(tmp_path / "llama"), data=data_folder, **SMALL)
    folder = collect(config)
    assert folder == tmp_path / "run" / "records" / "mlp" and collect(config) == folder
    record = read_records(layer_file(folder, 1), [39])[39]
    assert record.neuron == NeuronId("run", "mlp", 1, 39) and len(record.top) == 6
    with pytest.raises(UserError, match="is the run of another model"):
        collect(dataclasses.replace(config, model="elsewhere"))
    with pytest.raises(UserError, match="--model needs --data"):
        collect(dataclasses.replace(config, data=None))
    bpe = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a")
    bpe.save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="text of another tokenizer"):
        collect(dataclasses.replace(config, run=tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 33}, "longer than the 32 tokens"),
        ({"excerpts": 41}, "was made with excerpts = 40, not 41"),
        ({"site": "transformer.h.{layer}.ln_2", "excerpts": 10_000_000}, "room for"),
        ({"site": "nonsense"}, "no site 'nonsense'"),
        ({"site": "transformer.h.{layer}.ista.cods"}, "nearest: transformer.h.0.ista.codes"),
        ({"layers": (3,)}, "layer 3 is out of range"),
        ({"worker": "2/2"}, "has to be i/n"),
        ({"top": 7}, "was made with top = 6, not 7"),
    ],
)
def test_what_cannot_be_collected_is_refused(collected, runs_folder, changes, message):
    with pytest.raises(UserError, match=message):
        collect(dataclasses.replace(CollectConfig(runs_folder / "crate", **SMALL), **changes))


def test_a_layer_or_neuron_out_of_range_is_refused(collected, runs_folder):
    from transformers import AutoModelForCausalLM

    with pytest.raises(UserError, match="no neuron 512; this layer has neurons 0 to 511"):
        read_records(layer_file(collected["crate"], 0), [512])
    with pytest.raises(UserError, match="check the layer"):
        read_records(layer_file(collected["crate"], 1))
    model = AutoModelForCausalLM.from_pretrained(runs_folder / "crate" / "model")
    with pytest.raises(UserError, match="layer 1 is out of range"):
        Site("codes", "transformer.h.{layer}.ista.codes").module(model, 1)
    with (
        pytest.raises(UserError, match="neuron 600 is out of range"),
        steered(model, [Edit(site_named("auto", model), 0, 600, "set", 1.0)]),
    ):
        model(torch.zeros(1, 2, dtype=torch.long))


def test_records_of_another_model_are_refused(collected, runs_folder, tmp_path):
    import shutil

    run = tmp_path / "crate"
    shutil.copytree(runs_folder / "crate", run)
    shutil.copy(runs_folder / "gpt2" / "model" / "model.safetensors", tmp_path / "other.safetensors")
    weights = bytearray((run / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        collect(CollectConfig(run, **SMALL))
    (run / "model" / "whole.json").unlink()  # as a model changed on purpose
    with pytest.raises(UserError, match="was made with model_sha256"):
        collect(CollectConfig(run, **SMALL))
