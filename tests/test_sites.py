"""Sites of tiny random models of five families: what is read, how far a pass goes, what is said of a wrong name."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from cratescope.errors import UserError
from cratescope.models import CrateConfig
from cratescope.models.folder import skeleton
from cratescope.models.presets import build
from cratescope.neurons.sites import (
    BUILT_IN,
    Site,
    partial_pass,
    read_site,
    site_named,
    sites_of,
)
from cratescope.neurons.steer import Edit, steered
from tiny_models import tiny_config

SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "crate": CrateConfig(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32),
    "gpt_neox": GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "llama": LlamaConfig(**SHAPE, intermediate_size=48, num_key_value_heads=1),
    "qwen2": Qwen2Config(**SHAPE, intermediate_size=48, num_key_value_heads=1),
}
WIDTHS = {"codes": 64, "first_codes": 64, "mlp": 48, "attention": 16, "residual": 16}
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def models():
    return {kind: build(config, 0).eval() for kind, config in CONFIGS.items()}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in CONFIGS for name in BUILT_IN[kind]])
def test_every_built_in_site_is_read(models, kind, name):
    model, site = models[kind], site_named(name, models[kind])
    with torch.no_grad(), read_site(model, site, [0, 2]) as found:
        hidden = model(TOKENS, output_hidden_states=True).hidden_states
    width = 64 if (kind, name) == ("gpt2", "mlp") else WIDTHS[name]
    assert {layer: x.shape for layer, x in found.items()} == {0: (2, 12, width), 2: (2, 12, width)}
    if name == "residual":
        assert torch.equal(found[0], hidden[1])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "qwen2"])
def test_an_mlp_site_is_what_the_last_projection_is_given(models, kind):
    """So setting all of it to zero leaves of the MLP nothing but the projection's bias."""
    model, site = models[kind], site_named("auto", models[kind])
    projections = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h"}
    path = site.pattern.rpartition(".mlp.")[0] + ".mlp"
    mlp, given = Site("mlp", path).module(model, 1), []
    handle = getattr(mlp, projections.get(kind, "down_proj")).register_forward_pre_hook(lambda m, x: given.append(x[0]))
    with torch.no_grad(), read_site(model, site, [1]) as found:
        model(TOKENS)
    handle.remove()
    assert site.name == "mlp" and torch.equal(found[1], given[0])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["auto", "attention", "residual"])
def test_an_edit_reaches_the_output_and_leaves_no_trace(models, kind, name):
    model, site = models[kind], site_named(name, models[kind])
    with torch.no_grad():
        before = model(TOKENS).logits
        with steered(model, [Edit(site, 1, 5, "set", 3.0)]), read_site(model, site, [1, 2]) as found:
            during = model(TOKENS).logits
        assert (found[1][..., 5] == 3.0).all() and not torch.allclose(before, during)
        assert torch.equal(before, model(TOKENS).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pass_stops_behind_the_last_wanted_layer(models, kind):
    model, site, seen, reached = models[kind], site_named("auto", models[kind]), [], []
    handles = [
        module.register_forward_hook(lambda *_, name=name: reached.append(name))
        for name, module in model.named_modules()
        if name == "lm_head" or name == "embed_out" or name.endswith(("h.2", "layers.2"))
    ]
    assert len(handles) == 2
    with torch.no_grad(), partial_pass(model, site, [1, 0], lambda layer, x: seen.append((layer, x))) as run:
        run(TOKENS)
        run(TOKENS[:1])
    with torch.no_grad(), read_site(model, site, [0, 1]) as found:
        model(TOKENS)
    for handle in handles:
        handle.remove()
    assert [(layer, len(x)) for layer, x in seen] == [(0, 2), (1, 2), (0, 1), (1, 1)]
    assert all(torch.equal(found[layer], x) for layer, x in seen[:2])
    assert reached[:-2] == []  # the last two are of the whole pass


def test_a_wrong_name_is_refused_with_the_nearest_ones(models):
    with pytest.raises(
        UserError, match=r"no module 'model\.layers\.0\.mlp\.down'; nearest: model\.layers\.0\.mlp\.down_proj"
    ):
        Site("x", "model.layers.{layer}.mlp.down:input").module(models["llama"], 0)
    with pytest.raises(
        UserError, match=r"no site 'codes' for a gpt2 model .it has mlp, attention, residual.*\{layer\}"
    ):
        site_named("codes", models["gpt2"])
    with pytest.raises(UserError, match="layer 3 is out of range"):
        site_named("auto", models["llama"]).module(models["llama"], 3)


def test_a_module_without_neurons_is_refused(models):
    model = models["gpt2"]
    with (
        pytest.raises(UserError, match=r"shape \(3, 16\); name a module with a tensor"),
        read_site(model, Site("x", "transformer.h.{layer}.mlp"), [0]),
    ):
        model.transformer.h[0].mlp(torch.zeros(3, 16))


def test_an_input_given_by_name_is_read_and_edited(models):
    site, model = Site("x", "model.layers.{layer}.self_attn:input"), models["llama"]
    with torch.no_grad(), read_site(model, site, [0]) as found:
        before = model(TOKENS).logits
    assert found[0].shape == (2, 12, 16)
    force = Edit(site, 0, 3, "set", 9.0)
    with torch.no_grad(), steered(model, [force]), read_site(model, site, [0]) as found:
        assert not torch.allclose(before, model(TOKENS).logits)
    assert (found[0][..., 3] == 9.0).all()


@pytest.mark.parametrize(
    ("kind", "mlp", "attention"),
    [
        ("bloom", "transformer.h.{layer}.mlp.dense_4h_to_h:input", "transformer.h.{layer}.self_attention"),
        ("opt", "model.decoder.layers.{layer}.fc2:input", "model.decoder.layers.{layer}.self_attn"),
        ("bert", "bert.encoder.layer.{layer}.output.dense:input", "bert.encoder.layer.{layer}.attention"),
        ("lfm2", "model.layers.{layer}.feed_forward.w2:input", "model.layers.{layer}.self_attn"),
        ("gemma3n_text", "model.layers.{layer}.mlp.down_proj:input", "model.layers.{layer}.self_attn"),
        ("git", "git.encoder.layer.{layer}.output.dense:input", "git.encoder.layer.{layer}.attention"),
    ],
)
def test_sites_of_other_families_are_found_in_names_and_shapes(kind, mlp, attention):
    model = skeleton(tiny_config(kind))
    assert site_named("auto", model).pattern == mlp
    assert site_named("attention", model).pattern == attention
    assert site_named("residual", model).pattern == mlp.partition("{layer}")[0] + "{layer}"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mixtral", {"mlp": "model.layers.{layer}.mlp.experts:neurons"}),
        (
            "qwen2_moe",
            {
                "mlp": "model.layers.{layer}.mlp.shared_expert.down_proj:input",
                "experts": "model.layers.{layer}.mlp.experts:neurons",
            },
        ),
        (
            "nemotron_h",
            {
                "mlp": "model.layers.{layer}.mixer.shared_experts.down_proj:input",
                "experts": "model.layers.{layer}.mixer.experts:neurons",
                "mixer": "model.layers.{layer}.mixer.out_proj:input",
            },
        ),
        ("mamba", {"mixer": "backbone.layers.{layer}.mixer.out_proj:input"}),
        ("dbrx", {"attention": "transformer.blocks.{layer}.norm_attn_norm.attn"}),
        ("longcat_flash", {"attention": "model.layers.{layer}.self_attn.1"}),
        ("xlm", {"mlp": "transformer.ffns.{layer}.lin2:input"}),
    ],
)
def test_experts_mixers_and_nested_modules_are_found(kind, expected):
    found = sites_of(skeleton(tiny_config(kind)))
    assert expected.items() <= found.items()
    assert found.keys() - expected.keys() <= {"mlp", "attention", "residual"}
    assert ("mlp" in found) == (kind not in ("mamba", "dbrx"))
    assert ("residual" in found) == (kind != "xlm")  # a list of MLPs is not one of blocks


def test_a_model_without_a_site_of_neurons_is_answered_with_its_projections():
    model = skeleton(tiny_config("dbrx"))
    with pytest.raises(UserError, match=r"no site 'auto' for a .*residual.*\{layer\} in it: .*\.blocks\.") as said:
        site_named("auto", model)
    assert Site("x", str(said.value).rpartition(" ")[2]).layers(model) == [0, 1]


def test_residual_streams_side_by_side_are_one_row_of_neurons(models):
    model = models["llama"]
    site, block = Site("residual", "model.layers.{layer}"), model.model.layers[0]
    streams = block.register_forward_hook(lambda *args: args[2].unflatten(-1, (4, 4)))  # the first of all hooks
    with contextlib.suppress(RuntimeError), torch.no_grad(), read_site(model, site, [0]) as found:
        model(TOKENS)
    streams.remove()
    assert found[0].shape == (2, 12, 16)


def test_layers_that_lack_a_site_are_named(models):
    model = skeleton(tiny_config("lfm2_moe"))
    assert Site("x", "model.layers.{layer}.self_attn").layers(model) == [1]
    with pytest.raises(UserError, match=r"layer 0 has no 'model\.layers\.0\.self_attn'; .*: --layers 1$"):
        Site("x", "model.layers.{layer}.self_attn").module(model, 0)
