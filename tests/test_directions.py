"""Directions of neurons and their direct logits, against what the models themselves compute."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cratescope.errors import UserError
from cratescope.models.configuration_crate import CrateConfig
from cratescope.models.modeling_crate import CrateForCausalLM
from cratescope.models.sae import CoderConfig, Origin, SparseCoder
from cratescope.neurons.coded import CodedSite
from cratescope.neurons.directions import Readout, direct_logits, output_directions
from cratescope.neurons.sites import Site, hooked, site_named
from tiny_models import tiny_model

TOKENS = torch.tensor([[5, 9, 200, 7, 31]])


def crate(**options):
    torch.manual_seed(0)
    config = CrateConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64, **options)
    return CrateForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    for norm in (model.transformer.ln_f, *(block.ln_2 for block in model.transformer.h)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return model


def before_the_norm(model, site, layer, move=None):
    """The residual stream after the last block, at the last token, with the neurons moved."""
    seen = []
    norm = model.base_model.norm if hasattr(model.base_model, "norm") else model.base_model.ln_f
    handle = norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0, -1].clone()))

    def visit(_layer, x):
        x = x.clone()
        x[:, -1] += 0 if move is None else move
        return x

    with torch.no_grad(), hooked(model, site, [layer], visit):
        model(TOKENS)
    handle.remove()
    return seen[0]


VARIANTS = [
    lambda: crate(ista_tied=False),
    lambda: crate(feed_forward="lista"),
    lambda: crate(feed_forward="lista", ista_tied=False, ista_skip=True),
    lambda: crate(feed_forward="mlp", attention="mhsa", ista_skip=True),
]


@pytest.mark.parametrize("make", [crate, *VARIANTS, gpt2, lambda: tiny_model("llama")])
@pytest.mark.parametrize("name", ["auto", "residual"])
def test_one_unit_of_a_neuron_of_the_last_layer_moves_the_stream_by_its_direction(make, name):
    model = make()
    site = site_named(name, model)
    rows = output_directions(model, site, 1)
    move = torch.randn(len(rows), generator=torch.Generator().manual_seed(1))
    moved = before_the_norm(model, site, 1, move) - before_the_norm(model, site, 1)
    torch.testing.assert_close(moved, move @ rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [crate, gpt2, lambda: tiny_model("llama"), lambda: tiny_model("gemma")])
def test_direct_logits_are_the_model_s_own_where_the_stream_has_a_mean_square_of_one(make):
    model = make()
    norm = model.base_model.norm if hasattr(model.base_model, "norm") else model.base_model.ln_f
    readout = Readout.of(model)
    stream = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    stream -= stream.mean(1, keepdim=True)
    stream /= stream.square().mean(1, keepdim=True).sqrt()
    with torch.no_grad():
        there = model.get_output_embeddings()(norm(stream) - norm(-stream)) / 2
    torch.testing.assert_close(direct_logits(model, stream), there, atol=1e-4, rtol=1e-4)
    shifted = readout.logits(stream + 3)
    assert torch.allclose(shifted, readout.logits(stream), atol=1e-3) == readout.centred


def test_features_write_their_decoder_rows_through_the_neurons_that_they_code():
    model = gpt2()
    site = site_named("mlp", model)
    coder = SparseCoder(CoderConfig("topk", 128, 20, k=3), Origin(pattern=site.pattern))
    coded = CodedSite("sae/x", site.pattern, {1: coder})
    rows = output_directions(model, coded, 1)
    assert torch.allclose(rows, coder.decoder @ model.transformer.h[1].mlp.c_proj.weight, atol=1e-6)
    residual = site_named("residual", model)
    coder = SparseCoder(CoderConfig("topk", 32, 20, k=3), Origin(pattern=residual.pattern))
    rows = output_directions(model, CodedSite("sae/x", residual.pattern, {1: coder}), 1)
    assert torch.equal(rows, coder.decoder)


@pytest.mark.parametrize("make, pattern", [(crate, "ista"), (crate, "mssa"), (gpt2, "mlp"), (gpt2, "attn")])
def test_outputs_that_are_added_as_they_are_have_the_axes(make, pattern):
    rows = output_directions(make(), Site("x", f"transformer.h.{{layer}}.{pattern}"), 0)
    assert torch.equal(rows, torch.eye(32))


@pytest.mark.parametrize(
    "kind, pattern",
    [
        ("gpt2", "transformer.h.{layer}.ln_2"),
        ("gpt2", "transformer.h.{layer}.mlp.c_fc"),  # before the activation function
        ("llama", "model.layers.{layer}.self_attn.q_proj"),
        ("llama", "model.layers.{layer}.mlp.gate_proj"),
        ("gemma2", "model.layers.{layer}.mlp.down_proj:input"),  # a norm follows
        ("gemma2", "model.layers.{layer}.self_attn"),
        ("olmo2", "model.layers.{layer}.mlp"),
        ("mixtral", "model.layers.{layer}.mlp.experts:neurons"),
        ("openai-gpt", "transformer.h.{layer}.mlp"),  # added, and then normed
    ],
)
def test_what_is_not_added_by_one_matrix_is_refused(kind, pattern):
    with pytest.raises(UserError, match=r"layer.*; name other neurons"):
        output_directions(tiny_model(kind), Site("x", pattern), 1)


def test_codes_that_are_changed_once_more_are_refused():
    with pytest.raises(UserError, match="name the codes"):
        output_directions(crate(), Site("first_codes", "transformer.h.{layer}.ista.first_codes"), 1)
    one_step = crate(ista_steps=1)
    rows = output_directions(one_step, Site("first_codes", "transformer.h.{layer}.ista.first_codes"), 1)
    assert torch.equal(rows, one_step.transformer.h[1].ista.D)


@pytest.mark.parametrize("make", [crate, gpt2, lambda: tiny_model("llama")])
def test_narrow_formats_give_the_same_directions_in_float32(make):
    whole, narrow = make(), make().to(torch.bfloat16)
    for name in ("auto", "attention"):
        site = site_named(name, whole)
        rows = output_directions(narrow, site, 1)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, output_directions(whole, site, 1), atol=0.01, rtol=0.01)
    one, other = Readout.of(narrow), Readout.of(whole)
    assert one.centred == other.centred
    torch.testing.assert_close(one.gain, other.gain, atol=0.02, rtol=0.02)


def test_blocks_of_directions_give_the_same_as_all_at_once(monkeypatch):
    model = gpt2()
    rows, readout = output_directions(model, site_named("mlp", model), 0), Readout.of(model)
    monkeypatch.setattr("cratescope.neurons.directions.LOGITS_AT_ONCE", 1000)
    torch.testing.assert_close(torch.cat([*readout.blocks(rows)]), readout.logits(rows))
