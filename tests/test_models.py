"""CRATE as the paper defines it and as a Hugging Face model."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from cratescope.errors import UserError
from cratescope.models import CrateConfig, CrateForCausalLM
from cratescope.models.cost import count_parameters
from cratescope.models.modeling_crate import ISTA, MSSA
from cratescope.models.presets import CRATE_FIELDS, build, preset_config

# Paper section 2, table, in millions; S is printed as 55.9M there but its own architecture gives 59.9M.
PAPER_PARAMETERS = {
    "crate-1l": 6.54,
    "crate-2l": 6.64,
    "crate-3l": 6.74,
    "crate-s": 59.9,
    "crate-b": 81.2,
    "gpt2-1l": 6.64,
    "gpt2-2l": 6.83,
    "gpt2-3l": 7.03,
    "gpt2-s": 81.1,
    "gpt2-b": 123.6,
}


def tiny(family="crate", **changes):
    """A model small enough for a test, with weights large enough that attention is far from uniform."""
    config = preset_config(f"{family}-2l", vocab_size=64, context=32, eos_id=None)
    for name, value in ({"n_embd": 32, "n_head": 4} | changes).items():
        setattr(config, name, value)
    model = build(config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "ista" not in name:
                parameter.mul_(8)
    return model.eval()


def random_tokens(*shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", PAPER_PARAMETERS)
def test_presets_have_the_parameter_counts_of_the_paper(preset):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(preset))
    assert count_parameters(model) / 1e6 == pytest.approx(PAPER_PARAMETERS[preset], abs=0.1)


def test_the_block_computes_the_equations_of_the_paper():
    model = tiny()
    block, d, K, eta, lam = model.transformer.h[0], 32, 4, 0.1, 0.1
    Z = torch.randn(2, 7, d)
    LN = block.ln_1(Z)
    heads = []
    for k in range(K):
        V = LN @ block.mssa.U.weight[k * d // K : (k + 1) * d // K].T
        scores = (V @ V.transpose(1, 2) / math.sqrt(d / K)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ V)
    Z1 = Z + block.mssa.W(torch.cat(heads, -1))
    x, D = block.ln_2(Z1), block.ista.D.T
    A1 = F.relu(eta * x @ D - eta * lam)
    A2 = F.relu(A1 + eta * (x - A1 @ D.T) @ D - eta * lam)
    assert torch.allclose(block(Z), A2 @ D.T, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), position=st.integers(0, 10))
def test_attention_never_looks_ahead(seed, position):
    model = tiny()
    tokens = random_tokens(1, 12, seed=seed)
    changed = tokens.clone()
    changed[0, position + 1 :] = random_tokens(11 - position, seed=seed + 1)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits[0, : position + 1], model(changed).logits[0, : position + 1])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 6), lam=st.floats(0.0, 0.5), fraction=st.floats(0.05, 1.0))
def test_each_ista_step_lowers_the_nonnegative_lasso_when_eta_is_at_most_one_over_the_norm(seed, steps, lam, fraction):
    generator = torch.Generator().manual_seed(seed)
    ista = ISTA(CrateConfig(n_embd=16, n_head=2, ista_lambda=lam)).double()
    with torch.no_grad():
        ista.D.copy_(torch.randn(64, 16, generator=generator, dtype=torch.float64))
    ista.eta = fraction / torch.linalg.matrix_norm(ista.D, 2).item() ** 2
    X = torch.randn(5, 16, generator=generator, dtype=torch.float64)

    def objective(A):
        return ((X - A @ ista.D) ** 2).sum(-1) / 2 + lam * A.sum(-1)

    A, before = None, objective(torch.zeros(5, 64, dtype=torch.float64))
    for _ in range(steps):
        A = ista.step(X, A)
        assert (A >= 0).all()
        after = objective(A)
        assert (after <= before + 1e-9).all()
        before = after


def test_codes_are_nonnegative_and_some_are_zero():
    ista = tiny().transformer.h[0].ista
    codes = ista.encode(F.layer_norm(torch.randn(4, 9, 32), (32,)))
    assert (codes >= 0).all() and (codes == 0).any() and (codes > 0).any()


@pytest.mark.parametrize(
    "changes", [{"ista_steps": 3}, {"ista_skip": True}, {"ista_tied": False}, {"ista_lambda": 1.0}]
)
def test_every_ista_setting_changes_the_model_and_survives_saving(changes, tmp_path):
    model = tiny(**changes)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
        assert not torch.allclose(model(tokens).logits, tiny()(tokens).logits)
        assert ("transformer.h.0.ista.D_out" in model.state_dict()) == ("ista_tied" in changes)


@pytest.mark.parametrize("family", ["crate", "gpt2"])
def test_generating_with_the_cache_equals_generating_without_also_left_padded_and_batched(family):
    model = tiny(family)
    tokens = random_tokens(3, 8)
    mask = torch.ones_like(tokens)
    for row, pads in enumerate((0, 3, 6)):
        tokens[row, :pads] = 0
        mask[row, :pads] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, attention_mask=mask, use_cache=True, **options)
    plain = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)
    for row, pads in enumerate((0, 3, 6)):
        alone = model.generate(tokens[row : row + 1, pads:], attention_mask=mask[row : row + 1, pads:], **options)
        assert torch.equal(alone[0], cached[row, pads:])
    assert len(set(cached[0, 8:].tolist())) > 1


@pytest.mark.parametrize(("family", "widths"), [("crate", 1), ("gpt2", 2)])
def test_the_cache_holds_d_numbers_a_token_and_layer_for_crate_and_2d_for_gpt2(family, widths):
    model = tiny(family)
    cache = model(random_tokens(3, 10), use_cache=True).past_key_values
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert stored == widths * 32 * 10 * 3 * 2


def test_beam_search_works_on_the_one_tensor_cache():
    model = tiny()
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    tokens, mask = random_tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    assert torch.equal(
        model.generate(tokens, attention_mask=mask, use_cache=True, **beams),
        model.generate(tokens, attention_mask=mask, use_cache=False, **beams),
    )


def test_padding_does_not_change_the_logits_of_the_real_tokens():
    model = tiny()
    tokens = random_tokens(1, 6)
    padded = F.pad(tokens, (0, 4), value=0)
    with torch.no_grad():
        alone = model(tokens).logits
        beside = model(padded, attention_mask=(padded != 0).long()).logits
    assert torch.allclose(alone, beside[:, :6], atol=1e-5)


def test_eager_attention_equals_sdpa():
    model = tiny()
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        sdpa = model(tokens).logits
        model.set_attn_implementation("eager")
        eager = model(tokens, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(sdpa, eager.logits, atol=1e-4)
    assert len(eager.attentions) == 2 and eager.attentions[0].shape == (2, 4, 9, 9)
    assert len(eager.hidden_states) == 3


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        tokens = random_tokens(2, 9)
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_labels_give_the_mean_next_token_loss_and_ignore_minus_100():
    model = tiny()
    tokens = random_tokens(2, 9)
    labels = tokens.clone()
    labels[0, 4:] = -100
    with torch.no_grad():
        out = model(tokens, labels=labels)
        expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(out.loss, expected)


def test_bf16_runs_and_stays_near_float32():
    model = tiny()
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        full = model(tokens).logits
        half = model.to(torch.bfloat16)(tokens).logits
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(full.flatten(), half.float().flatten(), dim=0) > 0.99


def test_a_text_longer_than_the_context_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match="33 tokens are more than this model's context of 32"):
        tiny()(random_tokens(1, 33))


def test_attribute_map_gives_the_names_other_tools_ask_for():
    config = AutoConfig.for_model("crate", n_embd=64, n_layer=3, n_head=2, n_positions=128)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 2)
    assert config.max_position_embeddings == 128


def test_a_saved_folder_loads_without_cratescope_installed(tmp_path):
    model = tiny()
    tokens = random_tokens(1, 5)
    model.save_pretrained(tmp_path)
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "config.json").read_text())["auto_map"]
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "assert 'cratescope' not in sys.modules\n"
        f"print(model(torch.tensor({tokens.tolist()})).logits[0, -1].argmax().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) == model(tokens).logits[0, -1].argmax().item()


def test_a_variant_changes_any_field_that_the_twin_has_not_and_no_other():
    paper = CrateConfig()
    assert {"ista_steps", "ista_tied"} <= {*CRATE_FIELDS}
    for field in CRATE_FIELDS:
        assert getattr(preset_config("crate-h-1l", crate={field: str(getattr(paper, field))}), field) is not None
    for field in ("n_embd", "n_layer", "vocab_size", "layer_norm_epsilon", "tie_word_embeddings", "eos_token_id"):
        with pytest.raises(UserError, match=f"no field {field!r}"):
            preset_config("crate-1l", crate={field: "1"})


def test_wrong_settings_are_refused():
    with pytest.raises(StrictDataclassError, match="not a multiple of n_head"):
        CrateConfig(n_embd=30, n_head=4)
    with pytest.raises(UserError, match="no preset 'crate-9l'"):
        preset_config("crate-9l")
    with pytest.raises(UserError, match="no field 'lambda'"):
        preset_config("crate-1l", crate={"lambda": "1"})
    with pytest.raises(UserError, match="'x' is not a float"):
        preset_config("crate-1l", crate={"ista_lambda": "x"})
    for field, value in (
        ("ista_steps", "0"),
        ("ista_expansion", "0"),
        ("ista_lambda", "nan"),
        ("ista_step_size", "-1"),
        ("ista_gain", "true"),
    ):
        with pytest.raises(UserError, match="^crate-1l: ista_"):
            preset_config("crate-1l", crate={field: value, "ista_tied": "false"})
    with pytest.raises(UserError, match="has no CRATE fields"):
        preset_config("gpt2-1l", crate={"ista_lambda": "1"})


def test_the_output_matrix_starts_smaller_with_depth_and_the_dictionary_is_kaiming_uniform():
    model = build(preset_config("crate-3l", vocab_size=64, context=8), seed=0)
    assert model.transformer.h[0].mssa.W.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    assert model.transformer.h[0].mssa.U.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.transformer.h[0].ista.D.abs().max().item() == pytest.approx(math.sqrt(6 / 128), rel=0.01)
    assert isinstance(model, CrateForCausalLM) and isinstance(model.transformer.h[0].mssa, MSSA)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_the_fused_ista_equals_the_loop_in_value_and_every_gradient(steps, tied):
    ista = ISTA(CrateConfig(n_embd=8, n_head=2, n_layer=1, ista_steps=steps, ista_tied=tied)).double()
    torch.manual_seed(0)
    for parameter in ista.parameters():
        torch.nn.init.normal_(parameter)
    X = torch.randn(2, 5, 8, dtype=torch.double, requires_grad=True)
    G = torch.randn(2, 5, 8, dtype=torch.double)
    loop, fused = ista.eval()(X), ista.train()(X)
    assert "ISTAFunction" in type(fused.grad_fn.next_functions[0][0]).__name__
    torch.testing.assert_close(fused, loop)
    leaves = (X, *ista.parameters())
    for mine, other in zip(*(torch.autograd.grad(out, leaves, G) for out in (fused, loop)), strict=True):
        torch.testing.assert_close(mine, other)


def test_hooks_see_and_edit_the_codes_in_training_too():
    ista = ISTA(CrateConfig(n_embd=8, n_head=2, n_layer=1)).train()
    torch.nn.init.normal_(ista.D)
    X = torch.randn(1, 3, 8)
    for edit in (
        lambda: ista.codes.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output)),
        lambda: ista.codes.register_forward_pre_hook(lambda module, inputs: torch.zeros_like(inputs[0])),
    ):
        handle = edit()
        assert not ista(X).any()
        handle.remove()
        assert ista(X).any()
    ista.codes = torch.nn.Threshold(math.inf, 0)
    assert not ista(X).any()
