"""Variants of CRATE: lag, sparse codes with regulated thresholds, and the GPT-2 twins of each."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from cratescope.arm import TITLES, Arm
from cratescope.errors import UserError
from cratescope.lm.evaluate import reconstruction
from cratescope.lm.loss import fuse
from cratescope.models import CrateConfig, modeling_crate
from cratescope.models.cost import cached_bytes_per_token, flops_per_token
from cratescope.models.modeling_crate import (
    LISTA,
    CrateBlock,
    Lag,
    LagFunction,
    count_positive,
    gather,
    keep_where_positive,
    sum_of_all,
)
from cratescope.models.presets import FAMILIES, PRESETS, SIZES, build, preset_config
from cratescope.neurons.sites import site_named

VARIANTS = tuple(family for family in FAMILIES if family not in ("crate", "gpt2"))
LAGGED = tuple(family for family in VARIANTS if family.endswith("lag"))
BILINEAR = "crate-h-lag bilinear"
MODELS = (*VARIANTS, BILINEAR)
SPARSE = tuple(family for family in VARIANTS if "-h" in family)


def tiny(family, **changes):
    """A model small enough for a test, with weights large enough that attention is far from uniform.

    family: may be followed by fields to set, as `crate-h-lag bilinear`.
    """
    family, *fields = family.split()
    config = preset_config(f"{family}-2l", 64, 32, None, dict.fromkeys(fields, "true"))
    for name, value in ({"n_embd": 32, "n_head": 4} | changes).items():
        setattr(config, name, value)
    model = build(config, seed=1)
    chance = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bilinear.N"):
                parameter.normal_(generator=chance)
            elif parameter.dim() > 1:  # the blocks more than the embeddings: tied, these would repeat the last token
                parameter.mul_(32 if ".h." in name else 4)
            else:  # biases and lags as they may be after training
                parameter.add_(torch.randn(parameter.shape, generator=chance), alpha=0.3)
    return model.eval()


def random_tokens(*shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(pads):
    tokens = random_tokens(len(pads), 8)
    mask = torch.ones_like(tokens)
    for row, n in enumerate(pads):
        tokens[row, :n] = 0
        mask[row, :n] = 0
    return tokens, mask


def block_parameters(preset):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(preset))
    return sum(parameter.numel() for parameter in model.transformer.h.parameters())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", [*SPARSE, "gpt2-lag"])
def test_blocks_have_the_parameters_and_operations_of_gpt2s(family, size):
    assert block_parameters(f"{family}-{size}") == pytest.approx(block_parameters(f"gpt2-{size}"), rel=0.01)
    config, twin = preset_config(f"{family}-{size}"), preset_config(f"gpt2-{size}")
    assert flops_per_token(config, 256) == flops_per_token(twin, 256)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_arm_of_a_preset_says_what_its_blocks_are(preset):
    arm, config = Arm.trained(preset, 0, 0, {}), preset_config(preset)
    attention, feed_forward = getattr(config, "attention", "mhsa"), getattr(config, "feed_forward", "mlp")
    lag = " + lag" if getattr(config, "lag", False) else ""
    assert (arm.preset, arm.attention, arm.feed_forward) == (preset, attention + lag, feed_forward)
    assert arm.name in FAMILIES and arm.title == TITLES[arm.name] and ("lag" in arm.title) == bool(lag)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert site_named("auto", model).name == arm.site and site_named(arm.site, model).layers(model)


def test_with_three_projections_and_an_mlp_the_model_is_gpt2():
    """So what differs between GPT-2 and its variants in this file is what their names say, and nothing else."""
    theirs, ours = tiny("gpt2"), tiny("gpt2-lag", lag=False)
    names = {"mssa.U": "attn.c_attn", "mssa.W": "attn.c_proj", "ista.D": "mlp.c_fc", "ista.P": "mlp.c_proj"}
    given = {}
    for name, tensor in theirs.state_dict().items():
        for mine, other in names.items():
            if f".{other}." in name:
                tensor = tensor.t() if name.endswith("weight") else tensor  # noqa: PLW2901
                name = name.replace(f".{other}.", f".{mine}.")  # noqa: PLW2901
        given[name] = tensor
    ours.load_state_dict(given)
    tokens, mask = left_padded((0, 3, 6))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)
        padded, wanted = (model(tokens, attention_mask=mask).logits for model in (ours, theirs))
    torch.testing.assert_close(padded[mask.bool()], wanted[mask.bool()])
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_weights_of_gpt2s_twin_start_as_wide_as_gpt2s():
    ours, theirs = (build(preset_config(f"{family}-2l", 64, 8), 0).transformer.h[0] for family in ("gpt2-lag", "gpt2"))
    pairs = [(ours.mssa.U, theirs.attn.c_attn), (ours.mssa.W, theirs.attn.c_proj)]
    pairs += [(ours.ista.D, theirs.mlp.c_fc), (ours.ista.P, theirs.mlp.c_proj)]
    for mine, other in pairs:
        assert mine.weight.std().item() == pytest.approx(other.weight.std().item(), rel=0.03)
        assert not mine.bias.any() and not other.bias.any()


def test_the_block_computes_the_equations():
    model = tiny("crate-h-lag", ista_steps=2, ista_step_size=0.3)
    block, d, K, eta = model.transformer.h[0], 32, 4, 0.3
    Z = torch.randn(2, 7, d, generator=torch.Generator().manual_seed(0))
    LN, heads = block.ln_1(Z), []
    for k in range(K):
        V = LN @ block.mssa.U.weight[k * d // K : (k + 1) * d // K].T
        before = torch.cat([torch.zeros_like(V[:, :1]), V[:, :-1]], 1)
        Q, Y = (V + share[k] * (before - V) for share in (block.mssa.lag.alpha, block.mssa.lag.beta))
        scores = (Q @ Y.transpose(1, 2) / math.sqrt(d / K)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ V)
    Z1 = Z + block.mssa.W(torch.cat(heads, -1))
    x = (Z1 - Z1.mean(-1, keepdim=True)) / (Z1.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    D, theta = (block.ista.D / block.ista.D.norm(dim=1, keepdim=True)).T, block.ista.theta
    A1 = F.relu(eta * x @ D - eta * theta)
    A2 = F.relu(A1 + eta * (x - A1 @ D.T) @ D - eta * theta)
    torch.testing.assert_close(block(Z), Z1 + A2 @ block.ista.D_out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ista", "lista"])
def test_a_learned_step_and_a_gain_per_atom_compute_their_equations_and_are_saved(kind, tmp_path):
    learnt = {"ista_tied": True, "ista_gain": True, "ista_step_learned": True, "ista_steps": 2, "ista_step_size": 0.3}
    model = tiny("crate-h", feed_forward=kind, **learnt)
    fresh = build(model.config, seed=1).transformer.h[0].ista
    assert fresh.eta.item() == pytest.approx(0.3)
    assert fresh.gain.tolist() == pytest.approx([0.01 * math.sqrt(32)] * 160), "as small as an untied decoder starts"
    ista, X = model.transformer.h[0].ista, torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    eta, lam, D = ista.eta, ista.threshold(), ista.atoms().T
    assert eta.item() != pytest.approx(0.3)
    A = F.relu(eta * X @ D - eta * lam)
    A = F.relu(A + eta * (X - A @ D.T) @ D - eta * lam)
    torch.testing.assert_close(ista(X), A @ (ista.gain[:, None] * D.T), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ista.decoder(), ista.gain[:, None] * D.T)
    model.save_pretrained(tmp_path)
    tokens = random_tokens(1, 7)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_lags_start_by_head_and_for_any_number_of_heads():
    for heads in (1, 2, 4, 12):
        lag = (
            build(preset_config("crate-lag-1l", 64, 8) if heads == 4 else _with_heads(heads), 0)
            .transformer.h[0]
            .mssa.lag
        )
        assert lag.alpha.tolist() == ([0, 1, 0, 0] * 3)[:heads] and lag.beta.tolist() == ([0, 0, 1, 1] * 3)[:heads]


def _with_heads(heads):
    return CrateConfig(vocab_size=64, n_positions=8, n_embd=24, n_layer=1, n_head=heads, lag=True)


@settings(deadline=None, max_examples=20)
@given(family=st.sampled_from(VARIANTS), seed=st.integers(0, 1000), position=st.integers(0, 10))
def test_attention_never_looks_ahead(family, seed, position):
    model = tiny(family)
    tokens = random_tokens(1, 12, seed=seed)
    changed = tokens.clone()
    changed[0, position + 1 :] = random_tokens(11 - position, seed=seed + 1)
    with torch.no_grad():
        one, other = model(tokens).logits, model(changed).logits
    assert torch.equal(one[0, : position + 1], other[0, : position + 1])


@pytest.mark.parametrize("family", MODELS)
def test_generating_with_the_cache_equals_generating_without_also_left_padded_and_batched(family):
    model, pads = tiny(family), (0, 3, 6)
    tokens, mask = left_padded(pads)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    for how in ({"use_cache": True}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(tokens, attention_mask=mask, **options, **how), plain)
    for row, n in enumerate(pads):
        alone = model.generate(tokens[row : row + 1, n:], attention_mask=mask[row : row + 1, n:], **options)
        assert torch.equal(alone[0], plain[row, n:])
    assert len(set(plain[0, 8:].tolist())) > 1
    beams = options | {"num_beams": 3}
    cached, without = (model.generate(tokens, attention_mask=mask, use_cache=on, **beams) for on in (True, False))
    assert torch.equal(cached, without)


@pytest.mark.parametrize("family", LAGGED)
@pytest.mark.parametrize("dimensions", [2, 4])
def test_what_stands_in_padding_changes_nothing(family, dimensions):
    model = tiny(family)
    tokens, mask = left_padded((2, 5))
    other = torch.where(mask.bool(), tokens, 33)
    given = mask
    if dimensions == 4:
        given = torch.ones(8, 8).tril().bool() & mask[:, None, None].bool()
    with torch.no_grad():
        one, two = (model(ids, attention_mask=given).logits[mask.bool()] for ids in (tokens, other))
    assert torch.equal(one, two) and one.isfinite().all()


@pytest.mark.parametrize("family", LAGGED)
def test_texts_in_one_row_are_told_apart_by_their_positions(family):
    model = tiny(family)
    tokens = random_tokens(1, 11)
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(part).logits for part in tokens.split([4, 7], 1)], 1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["crate", "gpt2", *VARIANTS])
def test_the_cache_holds_the_bytes_that_are_stated(family):
    model = tiny(family)
    cache = model(random_tokens(3, 10), use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert stored == cached_bytes_per_token(model.config) * 10 * 3


@pytest.mark.parametrize("family", MODELS)
def test_eager_attention_equals_sdpa_and_shows_its_weights(family):
    model, tokens = tiny(family), random_tokens(2, 9)
    with torch.no_grad():
        sdpa = model(tokens).logits
        model.set_attn_implementation("eager")
        eager = model(tokens, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(sdpa, eager.logits, atol=1e-3, rtol=1e-3)
    assert len(eager.attentions) == 2 and eager.attentions[0].shape == (2, 4, 9, 9)


@pytest.mark.parametrize("family", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients_and_thresholds(family):
    found = []
    for checkpointing in (False, True):
        model = tiny(family).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        tokens = random_tokens(2, 9)
        model(tokens, labels=tokens).loss.backward()
        model.regulate()
        found.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_a_saved_model_is_the_same_also_without_cratescope_and_in_bfloat16(family, tmp_path):
    model, tokens = tiny(family), random_tokens(1, 7)
    for block in model.transformer.h:
        for buffer in block.buffers():
            buffer.add_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(again(tokens).logits, logits)
        low = half(tokens).logits
    assert low.dtype == torch.bfloat16 and F.cosine_similarity(logits.flatten(), low.float().flatten(), dim=0) > 0.98
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "config.json").read_text())["auto_map"]


def test_published_code_of_a_variant_runs_without_cratescope(tmp_path):
    model, tokens = tiny("crate-h-lag"), random_tokens(1, 5)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "assert 'cratescope' not in sys.modules\n"
        f"print(model(torch.tensor({tokens.tolist()})).logits[0, -1].argmax().item())"
    )
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) == model(tokens).logits[0, -1].argmax().item()


@settings(deadline=None, max_examples=40)
@given(
    **{"t": st.integers(1, 4), "tied": st.booleans(), "skip": st.booleans(), "lag": st.booleans()},
    **{"eta": st.floats(0.05, 1), "theta": st.floats(0, 2), "n": st.integers(1, 5), "seed": st.integers(0, 1000)},
    **{"learned": st.booleans(), "gain": st.booleans()},
    kind=st.sampled_from(["ista", "lista"]),
    penalty=st.sampled_from([0, 0.5]),
    reconstruction=st.sampled_from([0.0, 0.7]),
)
def test_gradients_by_hand_equal_those_of_autograd(
    t, tied, skip, lag, eta, theta, n, seed, learned, gain, kind, penalty, reconstruction
):
    fields = {"feed_forward": kind, "ista_steps": t, "ista_tied": tied, "ista_skip": skip, "lag": lag}
    fields |= {"ista_step_learned": learned, "ista_gain": gain and tied}
    fields |= {"ista_step_size": eta, "ista_lambda": theta, "ista_expansion": n}
    fields |= {"reconstruction_weight": reconstruction}
    block = CrateBlock(CrateConfig(n_embd=8, n_head=4, n_layer=1, **fields), 0).double().train()
    chance = torch.Generator().manual_seed(seed)
    for tensor in (*block.parameters(), *block.buffers()):
        torch.nn.init.normal_(tensor, generator=chance)
    if learned:
        torch.nn.init.constant_(block.ista.eta, eta)
    Z, G = (torch.randn(2, 5, 8, dtype=torch.double, generator=chance, requires_grad=True) for _ in range(2))
    block.mssa.config._attn_implementation = "eager"
    mask = torch.full((5, 5), -math.inf, dtype=torch.double).triu(1)
    leaves = (Z, *block.parameters())
    block.ista.sums = sums = [] if penalty else None
    seen = {}
    block.ista.register_forward_pre_hook(lambda _, inputs: seen.update(X=inputs[0]))

    def gradients(penalised):
        out = block(Z, attention_mask=mask)
        loss = (out * G).sum() + (penalty * penalised() if penalty else 0)
        return out, torch.autograd.grad(loss, leaves)

    def lasso():
        x = seen["X"].detach()
        rest = x - block.ista.write(block.ista.encode(x))
        return block.ista.encode(seen["X"]).sum() + reconstruction * rest.square().sum() / 2

    by_hand, found = gradients(lambda: sums.pop())
    block.ista.codes.register_forward_hook(lambda *_: None)  # asks for the plain loop
    if lag:
        block.mssa.lag.eval()
    loop, wanted = gradients(lasso)
    torch.testing.assert_close(by_hand, loop)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradients_of_lag_by_hand_equal_those_of_autograd_also_of_texts_in_one_row(packed):
    chance = torch.Generator().manual_seed(0)
    X, G = (torch.randn(2, 6, 3, 5, dtype=torch.double, generator=chance).transpose(1, 2) for _ in range(2))
    share = torch.randn(3, generator=chance).requires_grad_()
    leaves = (X.requires_grad_(), share)
    starts = torch.rand(2, 6, generator=chance) < 0.4 if packed else None
    by_hand, wanted = (mix(X, share, starts) for mix in (LagFunction.apply, Lag.mixed))
    torch.testing.assert_close(by_hand, wanted)
    for mine, other in zip(*(torch.autograd.grad(out, leaves, G) for out in (by_hand, wanted)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 1024, 2500])
def test_active_codes_are_counted_summed_and_masked_alike_in_every_number_format(dtype, rows):
    chance = torch.Generator().manual_seed(rows)
    A, G = (torch.randn(rows, 6, generator=chance).to(dtype) for _ in range(2))
    A = A.mul_(torch.tensor([1, 1, 1e-6, 0, -0.0, 1]).to(dtype)).relu_()
    A[0] = torch.tensor([0.0, -0.0, 1, 2**-24, math.inf, 1])
    assert count_positive(A).tolist() == [sum(a > 0 for a in column) for column in A.t().tolist()]
    masked = torch.where(A <= 0, 0, G)
    torch.testing.assert_close(keep_where_positive(G.clone(), A), masked, rtol=0, atol=0)
    assert sum_of_all(A[1:]).item() == pytest.approx(A[1:].double().sum().item(), rel=1e-6)


def lista(**changes):
    fields = {"feed_forward": "lista", "ista_steps": 1, "ista_step_size": 1.0, "ista_lambda": 1.5, "ista_tied": False}
    fields |= {"density_high": 0.05}
    block = LISTA(CrateConfig(n_embd=16, n_head=2, n_layer=1, **fields | changes)).train()
    for number, parameter in enumerate(block.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    block.theta.fill_(1.5)
    return block


def test_thresholds_move_by_how_often_atoms_are_active_and_by_the_rate_at_most():
    block = lista(homeostasis_rate=0.1)
    X = F.layer_norm(torch.randn(4, 50, 16), (16,))
    block.theta[0], block.theta[1], block.theta[2] = 100, -100, 1.3
    before, share = block.theta.clone(), (block.eval().encode(X) > 0).flatten(0, 1).float().mean(0)
    block.train()(X)
    block.regulate(lambda counts: counts, 1.0)
    moved = (block.theta - before) / 0.1
    assert moved[:2].tolist() == pytest.approx([-1, 1], abs=1e-3)
    for i, p in enumerate(share[2:].tolist(), 2):
        wanted = max(-1, math.log(p / 0.005)) if p and p < 0.005 else min(1, math.log(p / 0.05)) if p > 0.05 else 0
        assert moved[i].item() == pytest.approx(wanted if p else -1, abs=1e-3)


def test_homeostasis_brings_every_atom_into_its_band():
    block, chance = lista(homeostasis_rate=0.05), torch.Generator().manual_seed(0)
    for _ in range(150):
        block(F.layer_norm(torch.randn(500, 16, generator=chance), (16,)))
        block.regulate(lambda counts: counts, 1.0)
    with torch.no_grad():
        X = F.layer_norm(torch.randn(20_000, 16, generator=chance), (16,))
        share = (block.eval().encode(X) > 0).float().mean(0)
    assert share.min() > 0.002 and share.max() < 0.07


def test_thresholds_move_at_the_pace_they_are_told():
    fast, slow, X = lista(), lista(), F.layer_norm(torch.randn(6, 20, 16), (16,))
    for block, pace in ((fast, 1.0), (slow, 0.25)):
        block(X)
        block.regulate(lambda counts: counts, pace)
    assert (fast.theta - 1.5).abs().max() > 0.01
    torch.testing.assert_close(0.25 * (fast.theta - 1.5), slow.theta - 1.5)


def test_atoms_are_never_too_often_active_as_presets_have_it():
    block, X = lista(density_high=1.0), F.layer_norm(torch.randn(4, 50, 16), (16,))
    block.theta.fill_(-100)
    block(X)
    block.regulate(lambda counts: counts, 1.0)
    assert preset_config("crate-h-2l").density_high == 1 and torch.equal(
        block.theta, torch.full_like(block.theta, -100)
    )


def test_thresholds_stay_in_evaluation_without_gradients_and_at_rate_0():
    X = F.layer_norm(torch.randn(4, 50, 16), (16,))
    for block, work in (
        (lista().eval(), lambda block: block(X)),
        (lista(), torch.no_grad()(lambda block: block(X))),
        (lista(homeostasis_rate=0.0), lambda block: block(X)),
    ):
        work(block)
        block.regulate(lambda counts: counts, 1.0)
        assert torch.equal(block.theta, torch.full_like(block.theta, 1.5))
    assert "theta" in lista().state_dict() and not [n for n, _ in lista().named_parameters() if "theta" in n]


def test_counts_of_micro_batches_and_processes_add_up():
    X = F.layer_norm(torch.randn(6, 20, 16), (16,))
    whole, first, second = lista(), lista(), lista()
    whole(X)
    first(X[:2]), first(X[2:3]), second(X[3:])
    told = []
    second.regulate(lambda counts: told.append(counts) or counts, 1.0)
    first.regulate(lambda counts: counts + told[0], 1.0)
    whole.regulate(lambda counts: counts, 1.0)
    assert torch.equal(first.theta, whole.theta) and not torch.equal(first.theta, second.theta)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 5), fraction=st.floats(0.05, 1.0))
def test_each_step_lowers_the_lasso_with_a_penalty_per_atom(seed, steps, fraction):
    chance, block = torch.Generator().manual_seed(seed), lista().double().eval()
    with torch.no_grad():
        block.D.normal_(generator=chance)
        block.theta.uniform_(0, 2, generator=chance)
    D = F.normalize(block.D.detach(), dim=-1)
    block.eta = fraction / torch.linalg.matrix_norm(D, 2).item() ** 2
    X, A = torch.randn(5, 16, generator=chance, dtype=torch.double), None

    def objective(A):
        return ((X - A @ D) ** 2).sum(-1) / 2 + A @ block.theta

    before = objective(torch.zeros(5, len(D), dtype=torch.double))
    for _ in range(steps):
        A = block.step(X, A)
        after = objective(A)
        assert (after <= before + 1e-9).all()
        before = after


def test_atoms_count_by_their_direction_alone():
    block = lista().eval()
    X = torch.randn(3, 5, 16)
    before = block(X)
    with torch.no_grad():
        block.D.mul_(torch.rand(len(block.D), 1) + 0.5)
    torch.testing.assert_close(block(X), before)


def test_reconstruction_is_the_share_of_variance_that_scaled_codes_explain():
    model, crops = tiny("crate-h"), random_tokens(6, 20).numpy()
    seen = {}
    for layer, block in enumerate(model.transformer.h):
        block.ista.register_forward_hook(lambda m, i, o, layer=layer: seen.update({layer: i[0].flatten(0, 1)}))
    with torch.no_grad():
        found = reconstruction(model, crops, batch_size=4)
        model(torch.from_numpy(crops))
        for layer, block in enumerate(model.transformer.h):
            x, D = seen[layer].double(), F.normalize(block.ista.D, dim=-1).double()
            y = block.ista.encode(seen[layer]).double() @ D
            s = torch.linalg.lstsq(y.flatten()[:, None], x.flatten()[:, None]).solution.item()
            wanted = 1 - (x - s * y).square().sum() / (x - x.mean(0)).square().sum()
            assert found[layer] == pytest.approx(wanted.item(), abs=1e-6)
        for block in model.transformer.h:  # both directions of every axis lose nothing
            block.ista.D.copy_(
                torch.eye(32).repeat(5, 1) * torch.tensor([1, -1, 1, -1, 1]).repeat_interleave(32)[:, None]
            )
            block.ista.theta.copy_(torch.tensor([0.0, 0, 99, 99, 99]).repeat_interleave(32))
    assert reconstruction(model, crops) == pytest.approx([1, 1], abs=1e-5)
    assert reconstruction(tiny("gpt2-lag"), crops) == reconstruction(tiny("gpt2"), crops) == []


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 6), density=st.floats(0, 0.3), seed=st.integers(0, 1000))
def test_gathering_the_rows_of_active_atoms_equals_the_product(n, density, seed):
    chance = torch.Generator().manual_seed(seed)
    A, P = torch.rand(n, 50, generator=chance), torch.randn(50, 7, generator=chance)
    A[torch.rand(n, 50, generator=chance) >= density] = 0
    torch.testing.assert_close(gather(A, P), A @ P)


@pytest.mark.parametrize(
    ("tokens", "theta", "gathered"), [(1, 2.0, True), (3, 2.0, True), (9, 2.0, False), (1, 1, False)]
)
def test_only_few_tokens_of_sparse_codes_of_large_models_are_gathered(tokens, theta, gathered, monkeypatch):
    calls = []
    monkeypatch.setattr(modeling_crate, "gather", lambda A, P: calls.append(A) or gather(A, P))
    block = build(preset_config("crate-h-1l", 64, 16), 0).transformer.h[0].ista.eval()
    X = F.layer_norm(torch.randn(tokens, 128, generator=torch.Generator().manual_seed(0)), (128,))
    block.theta.fill_(theta)
    with torch.no_grad():
        wanted = block(X)
        assert not calls, "small models are faster by the product"
        monkeypatch.setattr(modeling_crate, "MANY_WEIGHTS", 1)
        found = block(X)
    assert bool(calls) == gathered
    torch.testing.assert_close(found, wanted)
    calls.clear()
    assert block(X).requires_grad and not calls


def test_an_atom_of_zeros_is_never_active():
    block = lista()
    with torch.no_grad():
        block.D[3] = 0
    for mode in (True, False):
        assert block.train(mode)(torch.randn(4, 16)).isfinite().all()
        assert not block.encode(torch.randn(4, 16))[:, 3].any()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("attention", "linear", "attention"),
        ("feed_forward", "swiglu", "feed_forward"),
        ("density_low", "0", "density_low"),
        ("density_low", "1.2", "density_low"),
        ("density_high", "1.5", "density_high"),
        ("homeostasis_rate", "-1", "homeostasis_rate"),
        ("homeostasis_rate", "nan", "homeostasis_rate"),
        ("ista_step_size", "1e300", "at most 1000"),
        ("lag", "perhaps", "lag"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(field, value, said):
    with pytest.raises(UserError, match=said) as refused:
        preset_config("crate-h-1l", crate={field: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("family", ["gpt2", "gpt2-lag", "crate-h-lag"])
def test_a_penalty_that_checkpointing_would_lose_is_refused(family):
    model = fuse(tiny(family).train(), lambda total: 0.01 * total)
    tokens = random_tokens(2, 7)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(tokens, labels=tokens).loss.backward()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(tokens, labels=tokens)


def test_a_bilinear_head_starts_as_the_inner_product_and_then_compares_by_its_own_form():
    plain, changed = (
        build(preset_config("crate-lag-2l", 64, 32, None, crate), 3).eval() for crate in ({}, {"bilinear": "true"})
    )
    tokens = random_tokens(2, 9)
    assert torch.equal(plain(tokens).logits, changed(tokens).logits)
    mssa = tiny(BILINEAR).transformer.h[0].mssa.double()
    Z = torch.randn(1, 6, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    V = (Z @ mssa.U.weight.T).view(6, 4, 8).transpose(0, 1)
    before = F.pad(V, (0, 0, 1, -1))
    alpha, beta = (share.view(4, 1, 1) for share in (mssa.lag.alpha, mssa.lag.beta))
    query, key = V + alpha * (before - V), V + beta * (before - V)
    form = torch.eye(8, dtype=torch.double) + mssa.bilinear.N
    scores = (
        torch.einsum("kie,kef,kjf->kij", query, form, key)
        + torch.einsum("kf,kjf->kj", mssa.bilinear.b.view(4, 8), key)[:, None]
    )
    weights = torch.softmax((scores / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf), -1)
    wanted = mssa.W((weights @ V).transpose(0, 1).reshape(1, 6, 32))
    mssa.config._attn_implementation = "eager"
    mask = torch.full((6, 6), -math.inf, dtype=torch.double).triu(1)
    torch.testing.assert_close(mssa(Z, attention_mask=mask)[0], wanted)


def test_a_bilinear_form_is_of_one_projection():
    with pytest.raises(UserError, match="bilinear is of attention = mssa"):
        preset_config("gpt2-h-lag-2l", crate={"bilinear": "true"})


@pytest.mark.parametrize(
    ("preset", "field", "value"),
    [
        ("gpt2-lag-2l", "ista_steps", "3"),
        ("gpt2-lag-2l", "ista_tied", "true"),
        ("crate-2l", "density_low", "0.01"),
        ("crate-2l", "homeostasis_rate", "0"),
    ],
)
def test_a_field_that_would_do_nothing_is_refused_by_name(preset, field, value):
    with pytest.raises(UserError, match=f"--crate {field}: does nothing in a model with feed_forward"):
        preset_config(preset, crate={field: value})


def test_a_preset_of_a_variant_can_be_changed_further():
    config = preset_config("crate-h-2l", crate={"ista_steps": "2", "ista_step_size": "0.3"})
    assert (config.feed_forward, config.ista_steps, config.ista_expansion, config.ista_tied) == ("lista", 2, 5, False)
    assert Arm.trained("crate-h-2l", 0, 0, {"ista_steps": "2"}).title == "CRATE-H ista_steps=2"
    assert isinstance(build(preset_config("crate-2l", 64, 8, crate={"lag": "true"}), 0).transformer.h[1].mssa.lag, Lag)
