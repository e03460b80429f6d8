"""The fast gradients of sparse autoencoders against autograd, and what the losses are made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cratescope.models.sae import CoderConfig, SparseCoder
from cratescope.sae import step as fast
from cratescope.sae.loss import code_of_batch, losses
from cratescope.sae.step import gradients

KINDS = ("relu", "topk", "batchtopk", "jumprelu", "matryoshka")


def coder_of(kind, d, m, k, seed, threshold=0.3):
    """Random in every weight, with few active features."""
    prefixes = tuple(sorted({max(1, m // 5), m // 2})) if kind == "matryoshka" else ()
    config = CoderConfig(kind, d, m, k, 0.2, 0.4, prefixes, aux=0.5)
    coder, chance = SparseCoder(config, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        coder.encoder.add_(torch.randn(m, d, generator=chance) * 0.1)
        coder.bias.copy_(torch.randn(d, generator=chance) * 0.1)
        coder.encoder_bias.copy_(torch.randn(m, generator=chance) * 0.1 - 1.5 * (kind in ("relu", "jumprelu")))
        if kind == "jumprelu":
            coder.threshold.copy_(torch.rand(m, generator=chance) * threshold)
    return coder


@pytest.fixture
def always_fast(monkeypatch):
    """Take the fast way however many features are active."""
    monkeypatch.setattr(fast, "DENSE", 1.0)
    monkeypatch.setattr(fast, "FULL", 1.0)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 40),
    d=st.integers(2, 24),
    m=st.sampled_from((7, 32, 48, 96, 128)),
    k=st.integers(1, 6),
    n_dead=st.sampled_from((0, 1, 5, 30)),
    seed=st.integers(0, 1000),
)
def test_the_fast_gradients_are_those_of_the_definition(always_fast, kind, tokens, d, m, k, n_dead, seed):
    coder, chance = coder_of(kind, d, m, k, seed), torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, d, generator=chance)
    dead = torch.zeros(m, dtype=torch.bool)
    dead[torch.randperm(m, generator=chance)[:n_dead]] = True
    wanted = losses(coder, x, dead)
    weights = {name: weight for name, weight in coder.named_parameters() if weight.requires_grad}
    grads = torch.autograd.grad(wanted.total, list(weights.values()))
    found = gradients(coder, x, dead)
    parts = [part.item() for part in (wanted.reconstruction, wanted.penalty, wanted.aux)]
    assert [found.reconstruction, found.penalty, found.aux] == pytest.approx(parts, rel=1e-4, abs=1e-6)
    assert found.l0 == pytest.approx(int((wanted.z > 0).sum()) / tokens)
    assert torch.equal(found.fired, (wanted.z > 0).any(0))
    assert torch.allclose(found.error, wanted.y - x, atol=1e-5)
    for name, grad in zip(weights, grads, strict=True):
        largest = float(grad.abs().max()) + 1e-6
        assert torch.allclose(weights[name].grad, grad, rtol=1e-4, atol=2e-5 * largest), name


@pytest.mark.parametrize("kind", KINDS)
def test_few_active_features_are_what_the_fast_way_is_taken_for(kind, monkeypatch):
    def never(*_):
        raise AssertionError("dense")

    monkeypatch.setattr(fast, "_dense", never)
    coder = coder_of(kind, 24, 128, 2, 0)
    with torch.no_grad():
        coder.encoder_bias.sub_(1.5 * (kind in ("relu", "jumprelu")))
    gradients(coder, torch.randn(50, 24), torch.zeros(128, dtype=torch.bool))


def test_a_batch_keeps_b_k_features_in_all_however_they_fall_on_its_tokens():
    coder, x = coder_of("batchtopk", 16, 64, 3, 1), torch.randn(20, 16)
    x[0] *= 10
    z, _ = code_of_batch(coder, coder.features(x))
    assert (z > 0).sum() == 60 and (z[0] > 0).sum() > 3


def test_matryoshka_chooses_once_for_all_of_its_prefixes():
    coder, x = coder_of("matryoshka", 16, 64, 3, 1), torch.randn(20, 16)
    plain = SparseCoder(CoderConfig("batchtopk", 16, 64, 3))
    plain.load_state_dict(coder.state_dict())
    z, _ = code_of_batch(coder, coder.features(x))
    assert torch.equal(z, code_of_batch(plain, plain.features(x))[0])
    found = losses(coder, x, torch.zeros(64, dtype=torch.bool))
    wanted = sum((z[:, :p] @ coder.decoder[:p] + coder.bias - x).square().sum(1).mean() for p in (12, 32, 64))
    assert found.reconstruction.item() == pytest.approx(wanted.item())


def test_dead_features_reconstruct_the_error_itself_by_half_the_width_of_it():
    coder, x = coder_of("topk", 10, 64, 3, 1), torch.randn(20, 10)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[:30] = True
    found = losses(coder, x, dead)
    seen = coder.features(x)[:, :30]
    rank = seen.argsort(1, descending=True).argsort(1)
    guess = (seen * (rank < 5)) @ coder.decoder[:30]  # half of d_in, not of the width; and no bias
    wanted = 0.5 * (guess - (x - found.y)).square().sum(1).mean()
    assert found.aux.item() == pytest.approx(wanted.item(), rel=1e-5)
    # The error is constant: a feature that is alive gets no gradient from it.
    (grad,) = torch.autograd.grad(found.aux, [coder.decoder])
    assert not grad[30:].any() and grad[:30].any()
    dead[2:] = False
    fewer = losses(coder, x, dead)
    guess = coder.features(x)[:, :2] @ coder.decoder[:2]
    wanted = 0.5 * (2 / 5) * (guess - (x - fewer.y)).square().sum(1).mean()
    assert fewer.aux.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_threshold_learns_from_what_lies_within_the_bandwidth_of_it():
    config = CoderConfig("jumprelu", 2, 1, penalty=3.0, bandwidth=0.2)
    coder = SparseCoder(config)
    with torch.no_grad():
        coder.encoder.copy_(torch.tensor([[1.0, 0.0]]))
        coder.decoder.copy_(coder.encoder)
        coder.threshold.fill_(1.0)
    x = torch.tensor([[0.95, 0.0], [1.05, 0.0], [1.2, 0.0], [0.8, 0.0]])
    gradients(coder, x, torch.zeros(1, dtype=torch.bool))
    # Two tokens lie near: d |e|^2 / dz = -2 x 0.95 for the silent one, 0 for the other.
    wanted = -(1.0 * (2 / 4) * (0 - 0.95) + 2 * 3.0 / 4) / 0.2
    assert float(coder.threshold.grad) == pytest.approx(wanted, rel=1e-5)
    assert coder.threshold.dtype == torch.float32
