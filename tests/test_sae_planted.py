"""Activations made from a known dictionary: each kind has to find its atoms."""

from __future__ import annotations

import pytest
import torch

from cratescope.models.sae import CoderConfig, SparseCoder, explained_variance
from cratescope.sae.learner import Learner, Plan
from cratescope.sae.planted import Planted, mean_max_cosine
from cratescope.sae.train import Units

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
