"""Sparse autoencoders made elsewhere: the three formats, written here as their libraries write them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from cratescope.errors import UserError
from cratescope.models.sae import CoderConfig, Origin, SparseCoder, coder_of, load_coder, save_coder
from cratescope.run import Run
from cratescope.sae.config import SaeConfig
from cratescope.sae.foreign import read_foreign
from cratescope.sae.train import train_coders

D, M, K = 12, 30, 3


def tensors(seed=0, d=D, m=M):
    chance = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,)}
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def saelens(folder, weights, **config):
    folder.mkdir(parents=True, exist_ok=True)
    m, d = weights["W_dec"].shape
    config = {"d_in": d, "d_sae": m, "apply_b_dec_to_input": True, "normalize_activations": "none"} | config
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def sparsify(folder, weights, **config):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": K, "d_in": D} | config
    (folder / "cfg.json").write_text(json.dumps(config))
    names = {"encoder.weight": weights["W_enc"].T.contiguous(), "encoder.bias": weights["b_enc"]}
    save_file(names | {name: weights[name] for name in ("W_dec", "b_dec")}, folder / "sae.safetensors")
    return folder


def dictionary(folder, state, **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save(state, folder / "ae.pt")
    return folder


def plain(weights):
    """Tensors as most classes of dictionary_learning name them."""
    named = {
        "encoder.weight": weights["W_enc"].T,
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T,
    }
    return named | {"b_dec": weights["b_dec"]}


def top(a, k=K):
    return a * (a >= a.sort(1).values[:, -k : -k + 1 or None])


def test_each_format_gives_the_codes_that_its_library_computes(tmp_path):
    w, x, threshold = tensors(), torch.randn(50, D), torch.rand(M)
    seen = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    without = x @ w["W_enc"] + w["b_enc"]
    norm = w["W_dec"].norm(dim=1)
    own = w | {"threshold": threshold}
    made = {
        "standard": (saelens(tmp_path / "1", w, architecture="standard"), seen.relu()),
        "jumprelu": (saelens(tmp_path / "2", own, architecture="jumprelu"), seen.relu() * (seen > threshold)),
        "topk": (saelens(tmp_path / "3", w, architecture="topk", k=K), top(seen.relu())),
        "rescaled": (
            saelens(tmp_path / "4", w, architecture="topk", k=K, rescale_acts_by_decoder_norm=True),
            top((seen * norm).relu()),
        ),
        "no pre-bias": (
            saelens(tmp_path / "5", w, architecture="standard", apply_b_dec_to_input=False),
            without.relu(),
        ),
        "old topk": (
            saelens(tmp_path / "6", w, activation_fn_str="topk", activation_fn_kwargs={"k": K}),
            top(seen.relu()),
        ),
        "sparsify": (sparsify(tmp_path / "7", w), top(seen.relu())),
        "topk dictionary": (
            dictionary(tmp_path / "8", plain(w), dict_class="AutoEncoderTopK", k=K),
            top(seen.relu()),
        ),
        "batchtopk dictionary": (
            dictionary(tmp_path / "9", plain(w) | {"threshold": torch.tensor(0.7)}, dict_class="BatchTopKSAE", k=K),
            seen * (seen > 0.7),
        ),
        "jumprelu dictionary": (
            dictionary(tmp_path / "10", own, dict_class="JumpReluAutoEncoder"),
            (without * (without > threshold)).relu(),
        ),
    }
    for name, (folder, codes) in made.items():
        coder = read_foreign(folder).coder(Origin()).requires_grad_(False)
        rows = w["W_dec"] / norm[:, None] if name == "rescaled" else w["W_dec"]
        assert torch.allclose(coder.encode(x), codes, atol=1e-4), name
        assert torch.allclose(coder(x), codes @ rows + w["b_dec"], atol=1e-3), name


class Code:
    """Something that a pickle would run code for."""


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    w = tensors()
    (tmp_path / "pickle").mkdir()
    torch.save(Code(), tmp_path / "pickle" / "sae.pt")
    wrong = {
        "gated": (saelens(tmp_path / "a", w, architecture="gated"), "architecture 'gated'"),
        "norm": (
            saelens(tmp_path / "b", w, normalize_activations="layer_norm"),
            "= 'layer_norm' is none",
        ),
        "k": (saelens(tmp_path / "c", w, architecture="topk"), "k = None"),
        "transcoder": (sparsify(tmp_path / "d", w, transcode=True), "transcode makes it a transcoder"),
        "groups": (sparsify(tmp_path / "e", w, activation="groupmax"), "only topk is done"),
        "class": (dictionary(tmp_path / "f", {}, dict_class="GatedAutoEncoder"), "'GatedAutoEncoder'; there are"),
        "object": (dictionary(tmp_path / "g", Code(), dict_class="AutoEncoder"), "could run code"),
        "tensor": (
            dictionary(tmp_path / "h", {"bias": w["b_dec"]}, dict_class="AutoEncoder"),
            "encoder.weight is missing",
        ),
        "pickle": (tmp_path / "pickle", "sae.pt may hold code"),
        "several": (tmp_path, "holds several sparse autoencoders"),
    }
    for name, (folder, said) in wrong.items():
        with pytest.raises(UserError, match=said.replace("(", ".")) as refused:
            read_foreign(folder)
        assert "\n" not in str(refused.value), name


@pytest.fixture
def run(runs_folder, tmp_path):
    shutil.copytree(runs_folder / "crate", tmp_path / "crate")
    return Run(tmp_path / "crate")


def test_an_autoencoder_from_elsewhere_becomes_one_of_the_run(run, data_folder, tmp_path):
    d = run.load_model().config.n_embd
    source = saelens(
        tmp_path / "theirs", tensors(d=d), architecture="standard", metadata={"hook_name": "transformer.h.0"}
    )
    options = {"name": "theirs", "source": str(source), "data": data_folder}
    (folder,) = train_coders(SaeConfig(run.root, **options))
    coder = coder_of(run, "theirs", 0)
    assert folder == run.saes("theirs") and coder.origin.pattern == "transformer.h.{layer}"
    assert train_coders(SaeConfig(run.root, **options)) == [folder]
    saelens(source, tensors(1, d=d), architecture="standard", metadata={"hook_name": "blocks.0.hook_resid_post"})
    with pytest.raises(UserError, match="holds another sparse autoencoder"):
        train_coders(SaeConfig(run.root, **options))
    with pytest.raises(UserError, match=f"is of activations of width {d}, site codes"):
        train_coders(SaeConfig(run.root, **options | {"site": "codes", "name": "other", "layers": (0,)}))
    saelens(source, tensors(1, d=d), architecture="standard")
    with pytest.raises(UserError, match="it says nothing; give its --site"):
        train_coders(SaeConfig(run.root, **options | {"name": "other"}))
    with pytest.raises(UserError, match="no such folder"):
        train_coders(SaeConfig(run.root, **options | {"source": "./nowhere"}))
    with pytest.raises(UserError, match="cannot be downloaded"):
        train_coders(SaeConfig(run.root, **options | {"source": "owner/name/layer"}))


def test_a_coder_of_another_model_is_refused(run):
    coder = SparseCoder(CoderConfig("relu", D, M), Origin(model_sha256="0" * 64))
    save_coder(run.saes("x") / "layer-00", coder)
    assert load_coder(run.saes("x") / "layer-00")
    with pytest.raises(UserError, match="trained on another model"):
        coder_of(run, "x", 0)
    with pytest.raises(UserError, match="no such sparse autoencoder; layer 0 has x"):
        coder_of(run, "y", 0)
