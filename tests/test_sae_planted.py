"""Activations made from a known dictionary: each kind has to find its atoms."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cratescope.models.sae import CoderConfig, SparseCoder, explained_variance
from cratescope.sae.learner import ENCODER_SHARE, Learner, Plan
from cratescope.sae.train import Units

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from planted_dictionary import Planted, mean_max_cosine  # noqa: E402

SMALL = Planted(n_atoms=64, d=32, active=3)
PENALTIES = {"relu": 1.0, "jumprelu": 0.3}


def test_the_true_dictionary_is_found_again_and_a_random_one_is_not():
    atoms = SMALL.atoms
    assert mean_max_cosine(atoms, atoms[torch.randperm(64)] * 3) == pytest.approx(1)
    assert mean_max_cosine(atoms, torch.randn(64, 32)) < 0.7
    x, codes = SMALL.batch(500, 0)
    assert explained_variance(x, codes @ atoms) == pytest.approx(1)
    assert (codes > 0).sum(1).float().mean() == 3


@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_each_kind_recovers_a_planted_dictionary(kind):
    prefixes = (32,) if kind == "matryoshka" else ()
    coder = SparseCoder(CoderConfig(kind, 32, 128, 3, PENALTIES.get(kind, 0.0), prefixes=prefixes))
    learner = Learner(coder, Plan(800, 3e-3, dead_after=50))
    units = Units.of(SMALL.batch(4000, 10**6)[0])
    for step in range(800):
        learner.step(units(SMALL.batch(256, step)[0]))
    assert mean_max_cosine(SMALL.atoms, coder.decoder.detach()) > 0.9


def test_dead_features_of_relu_start_again_at_tokens_that_are_badly_reconstructed():
    learner = Learner(SparseCoder(CoderConfig("relu", 32, 64, penalty=1.0), seed=1), Plan(80, 1e-3))
    coder, x = learner.coder, SMALL.batch(256, 0)[0]
    with torch.no_grad():
        coder.encoder_bias[[3, 40]] = -1e6
    assert learner.plan.resamples(10) and learner.plan.resamples(40) and not learner.plan.resamples(50)
    for _ in range(9):
        learner.step(x)
    assert sorted((learner.silent >= learner.dead_after).nonzero().flatten().tolist()) == [3, 40]
    before = {name: weight.detach().clone() for name, weight in learner.weights.items()}
    badly = x * torch.where(torch.arange(256) == 77, 100, 1)[:, None]  # nearly all of the squared loss is one token's
    learner.step(badly)
    direction = (badly[77] - coder.bias.detach()) / (badly[77] - coder.bias.detach()).norm()
    alive = [feature for feature in range(64) if feature not in (3, 40)]
    mean = coder.encoder.detach()[alive].norm(dim=1).mean()
    for feature in (3, 40):
        assert torch.allclose(coder.decoder[feature], direction, atol=1e-5)
        assert torch.allclose(coder.encoder[feature], direction * ENCODER_SHARE * mean, atol=1e-5)
        assert coder.encoder_bias[feature] == 0 and learner.silent[feature] == 0
        assert all(not learner.adam.state[coder.decoder][moment][feature].any() for moment in ("exp_avg", "exp_avg_sq"))
    assert torch.allclose(coder.decoder[alive], before["decoder"][alive], atol=0.01), "those alive go on as they were"
    assert learner.dead_share == 0
