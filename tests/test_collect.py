"""The streaming pass agrees with brute force, never crosses an excerpt, and resumes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.config import CollectConfig
from cratescope.lm.data import TokenData
from cratescope.neurons import collect as module
from cratescope.neurons.collect import LayerStatistics, Plan, collect
from cratescope.neurons.records import PROTOCOLS, NeuronId, layer_file, read_records
from cratescope.neurons.sites import Intervention, Site, intervene, site_named
from cratescope.run import UserError

SMALL = {
    "excerpts": 40,
    "context": 24,
    "window": 8,
    "top": 6,
    "random": 6,
    "part": 16,
    "batch_size": 4,
    "device": "cpu",
}


def statistics_of(activations, config, parts):
    """Stream (n, t, h) activations in `parts` merged parts and return the neurons' records."""
    n, t, h = activations.shape
    plan = Plan.of(config, 0, h, t)
    total = LayerStatistics(plan, h)
    for part in np.array_split(np.arange(n), parts):
        one = LayerStatistics(plan, h)
        for batch in np.array_split(part, 2):
            if len(batch):
                one.update(torch.from_numpy(activations[batch]), int(batch[0]))
        total.merge(one.state())
    tokens = np.arange(n * t).reshape(n, t)
    return total.records("m", "s", 0, tokens)


def configuration(tmp_path, excerpts, **changes):
    return CollectConfig(tmp_path, **(SMALL | {"excerpts": excerpts} | changes))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 12),
    t=st.integers(2, 20),
    parts=st.integers(1, 4),
    levels=st.sampled_from([2, 4, 1000]),
)
def test_streaming_statistics_equal_brute_force_also_with_ties_and_dead_and_constant_neurons(
    seed, n, t, parts, levels, tmp_path_factory
):
    rng = np.random.default_rng(seed)
    activations = np.maximum(rng.integers(-levels, levels, size=(n, t, 4)) / levels, 0).astype(np.float32)
    activations[..., 2] = 0
    activations[..., 3] = 0.5
    config = configuration(tmp_path_factory.getbasetemp(), n)
    for h, record in enumerate(statistics_of(activations, config, parts)):
        a = activations[..., h].astype(np.float64)
        moments = record.moments
        assert moments.n_tokens == a.size
        assert moments.mean == pytest.approx(a.mean())
        assert moments.variance == pytest.approx(a.var(), abs=1e-12)
        assert moments.maximum == a.max()
        assert record.density == pytest.approx((a != 0).mean())
        if a.var() > 1e-9:
            central = a - a.mean()
            assert moments.skewness == pytest.approx((central**3).mean() / a.var() ** 1.5, abs=1e-6)
            assert moments.kurtosis == pytest.approx((central**4).mean() / a.var() ** 2, rel=1e-6)
        else:
            assert moments.skewness is None and moments.kurtosis is None
        best = sorted((-a[e].max(), e, int(a[e].argmax())) for e in range(n))[: config.top]
        wanted = [(e, position) for value, e, position in best if value < 0]
        assert [(r.excerpt, r.start + r.peak) for r in record.top] == wanted
    assert record.moments.skewness is None
    assert statistics_of(activations, config, 1)[2].dead


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), t=st.integers(2, 40), window=st.integers(1, 50))
def test_windows_never_cross_an_excerpt_and_never_overlap(seed, n, t, window, tmp_path_factory):
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(n, t, 2)).astype(np.float32)
    config = configuration(tmp_path_factory.getbasetemp(), n, window=window)
    for h, record in enumerate(statistics_of(activations, config, 2)):
        windows = record.top + record.random
        for one in windows:
            assert one.start >= 0 and one.start + len(one.tokens) <= t and len(one.tokens) == min(window, t)
            assert 0 <= one.peak < len(one.tokens)
            where = slice(one.start, one.start + len(one.tokens))
            assert np.array_equal(one.tokens, np.arange(n * t).reshape(n, t)[one.excerpt, where])
            assert np.array_equal(one.activations, activations[one.excerpt, where, h])
        tokens = np.concatenate([one.tokens for one in windows]) if windows else np.array([])
        assert len(tokens) == len(set(tokens.tolist()))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), protocol=st.sampled_from(sorted(PROTOCOLS)))
def test_no_token_both_explains_and_scores_a_neuron(seed, protocol, tmp_path_factory):
    activations = np.random.default_rng(seed).random((30, 16, 2), dtype=np.float32)
    record = statistics_of(activations, configuration(tmp_path_factory.getbasetemp(), 30, top=12), 3)[0]
    explain = {int(t) for one in PROTOCOLS[protocol].explain_records(record) for t in one.tokens}
    scoring = {int(t) for one in PROTOCOLS[protocol].score_records(record) for t in one.tokens}
    assert explain and scoring and not explain & scoring


def test_how_the_excerpts_are_split_into_parts_and_batches_changes_nothing(tmp_path):
    activations = np.random.default_rng(0).random((40, 24, 8), dtype=np.float32)
    config = configuration(tmp_path, 40)
    one, many = statistics_of(activations, config, 1), statistics_of(activations, config, 7)
    for a, b in zip(one, many, strict=True):
        assert [r.key for r in a.top + a.random] == [r.key for r in b.top + b.random]
        assert a.moments.mean == pytest.approx(b.moments.mean, rel=1e-12)


def test_random_windows_are_uniform_over_the_text(tmp_path):
    activations = np.zeros((50, 20, 400), dtype=np.float32)
    records = statistics_of(activations, configuration(tmp_path, 50, window=1, random=10), 2)
    positions = np.array([r.excerpt * 20 + r.start for record in records for r in record.random])
    counts = np.histogram(positions, bins=10, range=(0, 1000))[0]
    assert len(positions) == 4000
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001


def test_nan_is_refused_with_its_place(tmp_path):
    activations = np.zeros((4, 5, 3), dtype=np.float32)
    activations[2, 3, 1] = np.nan
    with pytest.raises(UserError, match="neuron 1 is NaN at excerpt 2, token 3"):
        statistics_of(activations, configuration(tmp_path, 4), 1)


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
    with torch.no_grad(), module.read_site(model, site_named("auto", model.config.model_type), [0]) as found:
        model(torch.from_numpy(excerpts))
    for one in record.top[:3] + record.random:
        window = slice(one.start, one.start + len(one.tokens))
        assert np.array_equal(excerpts[one.excerpt, window], one.tokens)
        assert np.allclose(found[0][one.excerpt, window, 5].numpy(), one.activations, atol=1e-5)
    assert record.moments.mean == pytest.approx(found[0][..., 5].mean().item(), rel=1e-4)


def test_records_read_in_pandas_in_one_line(collected):
    table = pandas.read_parquet(layer_file(collected["crate"], 0))
    assert len(table) == 512 and {"layer", "index", "density", "top", "random"} <= set(table.columns)


def test_a_kill_between_parts_loses_no_whole_part_and_changes_no_byte(runs_folder, tmp_path, monkeypatch, collected):
    config = CollectConfig(runs_folder / "crate", site="transformer.h.{layer}.ista.first_codes", **SMALL)
    whole = layer_file(collect(config), 0)
    before = whole.read_bytes()
    whole.unlink()
    read_part, read = module._read_part, []

    def killed_after_one(*arguments):
        if read:
            raise KeyboardInterrupt
        read.append(arguments[-1])
        return read_part(*arguments)

    monkeypatch.setattr(module, "_read_part", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        collect(config)
    part = whole.parent / ".parts" / "part-00000.safetensors"
    assert part.exists()
    monkeypatch.setattr(module, "_read_part", lambda *a: (read.append(a[-1]), read_part(*a))[1])
    collect(config)
    assert read == [0, 16, 32]
    assert whole.read_bytes() == before and not part.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 33}, "longer than the 32 tokens"),
        ({"excerpts": 41}, "was made with excerpts = 40, not 41"),
        ({"site": "transformer.h.{layer}.ln_2", "excerpts": 10_000_000}, "room for"),
        ({"site": "nonsense"}, "no site 'nonsense'"),
        ({"site": "transformer.h.{layer}.ista.cods"}, "nearest: transformer.h.0.ista.codes"),
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
        intervene(model, Intervention(site_named("auto", model.config.model_type), 0, 600, 1.0)),
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
    with pytest.raises(UserError, match="was made with model_sha256"):
        collect(CollectConfig(run, **SMALL))
