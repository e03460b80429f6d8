"""Sparse autoencoders as they are used: their equations, their units, and their files."""

from __future__ import annotations

import json

import pytest
import torch

from cratescope.errors import UserError
from cratescope.files import WHOLE
from cratescope.models.sae import (
    CONFIG,
    WEIGHTS,
    CoderConfig,
    Origin,
    SparseCoder,
    explained_variance,
    load_coder,
    save_coder,
)

KINDS = ("relu", "topk", "batchtopk", "jumprelu", "matryoshka")
ORIGIN = Origin("crate", "ab" * 32, "mlp", "transformer.h.{layer}.mlp.act", 3, 64, "data")


def random_coder(kind, d=6, m=20, seed=0, **settings):
    """A coder whose every tensor is random, thresholds above 0 where the kind has them."""
    coder = SparseCoder(CoderConfig(kind, d, m, k=4, **settings), ORIGIN)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in coder.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        coder.threshold.abs_().mul_(kind not in ("relu", "topk"))
    return coder.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_follow_the_equations_one_feature_at_a_time(kind):
    coder, x = random_coder(kind), torch.randn(7, 6)
    codes = coder.encode(x)
    for token, code in zip(x, codes, strict=True):
        seen = [float(row @ (token - coder.bias) + c) for row, c in zip(coder.encoder, coder.encoder_bias, strict=True)]
        if kind == "topk":
            bound = sorted(seen)[-4]
            wanted = [max(a, 0) * (a >= bound) for a in seen]
        else:
            wanted = [a * (a > max(float(t), 0)) for a, t in zip(seen, coder.threshold, strict=True)]
        assert torch.allclose(code, torch.tensor(wanted), atol=1e-5)
    assert torch.allclose(coder(x), codes @ coder.decoder + coder.bias)


def test_the_code_of_a_token_does_not_depend_on_the_others_and_keeps_leading_axes():
    coder, x = random_coder("batchtopk"), torch.randn(2, 3, 6)
    assert coder.encode(x).shape == (2, 3, 20)
    assert torch.allclose(coder.encode(x)[1, 2], coder.encode(x[1, 2]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_coder_of_centred_and_scaled_activations_is_folded_into_one_of_the_activations(kind):
    coder, x, mean, scale = random_coder(kind), torch.randn(50, 6) * 9 + 4, torch.randn(6) * 4, 0.21
    inside = (x - mean) * scale
    codes, y = coder.encode(inside) / scale, coder(inside) / scale + mean
    coder.fold(mean, scale)
    assert torch.allclose(coder.encode(x), codes, atol=1e-4) and torch.allclose(coder(x), y, atol=1e-4)


@pytest.mark.parametrize("kind", ("relu", "jumprelu", "batchtopk"))
def test_unit_rows_change_no_reconstruction(kind):
    coder, x = random_coder(kind), torch.randn(9, 6)
    before = coder(x)
    coder.unit_rows()
    assert torch.allclose(coder(x), before, atol=1e-5)
    assert torch.allclose(coder.decoder.norm(dim=1), torch.ones(20))


def test_explained_variance_is_0_for_the_mean_and_1_for_the_true_decomposition():
    x = torch.randn(500, 6) + torch.arange(6) * 10
    assert explained_variance(x, x.mean(0).expand(500, 6)) == pytest.approx(0, abs=1e-6)
    assert explained_variance(x, torch.zeros(500, 6)) < -1  # about zero it would be 0
    atoms, codes = torch.randn(20, 6), torch.rand(300, 20) * (torch.rand(300, 20) < 0.2)
    assert explained_variance(codes @ atoms, codes @ atoms) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_coder_comes_back_whole(kind, tmp_path):
    coder, x = random_coder(kind, prefixes=(5, 20) if kind == "matryoshka" else ()), torch.randn(9, 6)
    save_coder(tmp_path / "layer-03", coder)
    loaded = load_coder(tmp_path / "layer-03")
    assert (loaded.config, loaded.origin) == (coder.config, coder.origin)
    assert torch.equal(loaded.encode(x), coder.encode(x)) and torch.equal(loaded(x), coder(x))
    about = json.loads((tmp_path / "layer-03" / CONFIG).read_text())
    assert about["architecture"] == {"relu": "standard", "topk": "topk"}.get(kind, "jumprelu")
    assert about["metadata"]["hook_name"] == "transformer.h.3.mlp.act"


def edit(folder, change):
    """Change cfg.json as its owner might, who deletes the mark too."""
    path = folder / CONFIG
    about = json.loads(path.read_text())
    change(about["metadata"]["cratescope"])
    path.write_text(json.dumps(about))
    (folder / WHOLE).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ours: ours.update(width=10**12), "W_enc has shape"),
        (lambda ours: ours.update(kind="gated"), "kind = 'gated'; there are relu"),
        (lambda ours: ours.update(k=99), "k = 99 of 20 features"),
        (lambda ours: ours.pop("k"), "k is missing"),
        (lambda ours: ours["origin"].update(layer="x"), "layer is a str"),
    ],
)
def test_an_odd_configuration_is_refused_in_one_line(change, said, tmp_path):
    save_coder(tmp_path / "sae", random_coder("topk"))
    edit(tmp_path / "sae", change)
    with pytest.raises(UserError, match=said) as refused:
        load_coder(tmp_path / "sae")
    assert "\n" not in str(refused.value)


def test_damaged_files_are_refused(tmp_path):
    folder = tmp_path / "sae"
    with pytest.raises(UserError, match="no sparse autoencoder there"):
        load_coder(folder)
    save_coder(folder, random_coder("relu"))
    weights = folder / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        load_coder(folder)
    (folder / WHOLE).unlink()
    weights.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="damaged"):
        load_coder(folder)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_coder(folder)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    coder = random_coder("relu")
    with torch.no_grad():
        coder.decoder[2, 3] = torch.nan
    save_coder(tmp_path / "sae", coder)
    with pytest.raises(UserError, match="W_dec holds NaN"):
        load_coder(tmp_path / "sae")
