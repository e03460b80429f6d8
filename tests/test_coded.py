"""Features of sparse autoencoders as a site: read, edited, collected, explained and shown like neurons."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig, SimulateConfig
from cratescope.explain.explain import explain
from cratescope.explain.simulate import simulate
from cratescope.llm.config import LLMConfig
from cratescope.models.sae import CoderConfig, Origin, SparseCoder, save_coder
from cratescope.neurons.coded import find_coders
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.records import NeuronId, layer_file, read_records
from cratescope.neurons.sites import hooked, read_site
from cratescope.neurons.steer import Edit, steered
from cratescope.results.scores import Scores
from cratescope.run import Run
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score
from cratescope.text.shards import TokenData
from scripted import ScriptedLLM
from test_collect import SMALL

WIDTH, FEATURES = 512, 96
PATTERN = {"crate": "transformer.h.{layer}.ista.codes", "gpt2": "transformer.h.{layer}.mlp.act"}


def random_coder(run, family="gpt2", kind="topk", width=WIDTH, **origin):
    """An autoencoder that was not trained, of the activations at a run's native site."""
    about = {"model_sha256": run.fingerprint(), "pattern": PATTERN[family]} | origin
    coder = SparseCoder(CoderConfig(kind, width, FEATURES, k=7), Origin(**about))
    with torch.no_grad():
        coder.bias.normal_(0, 0.01)
    return coder


@pytest.fixture(params=["crate", "gpt2"])
def run(runs_folder, tmp_path, request):
    shutil.copytree(
        runs_folder / request.param, tmp_path / request.param, ignore=shutil.ignore_patterns("records", "saes")
    )
    run = Run(tmp_path / request.param)
    save_coder(run.saes("small") / "layer-00", random_coder(run, request.param))
    return run


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def tokens(data_folder):
    return torch.from_numpy(TokenData.open(data_folder).split("heldout").spaced(4, 24))


def test_what_is_seen_are_codes_and_editing_none_changes_no_bit(run, tokens):
    model, site = run.load_model(), find_coders(run, "small")
    plain = logits(model, tokens)
    with read_site(model, site, [0]) as found:
        assert torch.equal(logits(model, tokens), plain)
    assert found[0].shape == (4, 24, FEATURES)
    assert ((found[0] > 0).sum(-1) <= 7).all()
    with hooked(model, site, [0], lambda layer, codes: codes.clone()):
        assert torch.equal(logits(model, tokens), plain)


def test_replacing_differs_from_adding_by_the_error_of_the_autoencoder(run, tokens):
    model, added = run.load_model(), find_coders(run, "small")
    replaced = find_coders(run, "small", replace=True)
    with torch.no_grad(), read_site(model, type(added).__base__(added.name, added.pattern), [0]) as plain:
        model(tokens)
    x = plain[0].clone()
    after = {}
    for site in (added, replaced):
        below = type(site).__base__(site.name, site.pattern)  # sees what the hook before it leaves
        force = Edit(site, 0, 5, "set", 2.0)
        with torch.no_grad(), steered(model, [force]), read_site(model, below, [0]) as found:
            model(tokens)
        after[site.replace] = found[0]
    with torch.no_grad():
        error = x - added.coders[0](x)
    assert error.abs().max() > 0.01
    assert torch.allclose(after[False] - after[True], error, atol=1e-5)


def test_a_feature_is_collected_explained_scored_and_read_like_a_neuron(run, data_folder):
    folder = collect(CollectConfig(run.root, data=data_folder, site="sae/small", **SMALL))
    assert folder == run.records("sae/small")
    record = read_records(layer_file(folder, 0), [3])[3]
    assert record.neuron == NeuronId(run.name, "sae/small", 0, 3)
    model, excerpts = run.load_model(), TokenData.open(data_folder).split("heldout").spaced(40, 24)
    with torch.no_grad(), read_site(model, find_coders(run, "small"), [0]) as found:
        model(torch.from_numpy(excerpts))
    assert record.density == pytest.approx(float((found[0][..., 3] > 0).float().mean()), abs=1e-9)
    for one in record.top[:3]:
        window = slice(one.start, one.start + len(one.tokens))
        assert np.allclose(found[0][one.excerpt, window, 3], one.activations, atol=1e-5)
    llm = ScriptedLLM(lambda prompt: " words", lambda prompt, token: float(len(token) % 3))
    of = {"site": "sae/small", "protocols": ("uniform",)}
    asked = {"llm": LLMConfig(llm="scripted")}
    explain(ExplainConfig(run.root, **of, **asked), llm)
    simulate(SimulateConfig(run.root, explainer="scripted", **of, **asked), llm)
    scores = Scores.read(score(ScoreConfig(run.root, explainer="scripted", **of)))
    assert scores.mean("uniform").n > 0
    assert run.neuron(0, 3, "sae/small").id == record.neuron


def test_records_of_an_autoencoder_are_of_its_weights(run, data_folder):
    config = CollectConfig(run.root, data=data_folder, site="sae/small", **SMALL)
    folder = collect(config)
    before = layer_file(folder, 0).read_bytes()
    collect(config)
    assert layer_file(folder, 0).read_bytes() == before
    other = random_coder(run, run.name)
    with torch.no_grad():
        other.encoder[0] += 1
    shutil.rmtree(run.saes("small"))
    save_coder(run.saes("small") / "layer-00", other)
    with pytest.raises(UserError, match="sae_sha256"):
        collect(config)


def test_an_autoencoder_that_does_not_belong_to_the_model_is_refused(run, data_folder):
    config = CollectConfig(run.root, data=data_folder, site="sae/other", **SMALL)
    with pytest.raises(UserError, match=r"no sparse autoencoder 'other' \(found: small\); train one with `cratescope"):
        collect(config)
    save_coder(run.saes("other") / "layer-00", random_coder(run, run.name, model_sha256="ab" * 32))
    with pytest.raises(
        UserError, match="layer-00: trained on another model than .*; train one here with `cratescope sae`"
    ):
        collect(config)
    shutil.rmtree(run.saes("other"))
    save_coder(run.saes("other") / "layer-00", random_coder(run, run.name, width=WIDTH - 1))
    with pytest.raises(UserError, match=r"autoencoder is of activations of width 511, .* has 512; it was made for"):
        collect(config)
    shutil.rmtree(run.saes("other"))
    save_coder(run.saes("other") / "layer-00", random_coder(run, run.name, pattern="transformer.h.{layer}.nowhere"))
    with pytest.raises(UserError, match="this model has no module 'transformer.h.0.nowhere'"):
        collect(config)
    assert not run.records("sae/other").exists()


def test_a_layer_without_an_autoencoder_is_named(run, data_folder):
    with pytest.raises(UserError, match="sae/small: layer 1 has no autoencoder; name one of those that have: 0"):
        collect(CollectConfig(run.root, data=data_folder, site="sae/small", layers=(1,), **SMALL))
