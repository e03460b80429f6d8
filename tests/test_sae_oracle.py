"""Sparse autoencoders against SAELens and sparsify, which need an environment of their own.

`make slow` makes it; SAE_PYTHON names its Python.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cratescope.models.sae import CoderConfig, Origin, SparseCoder, save_coder
from cratescope.sae.foreign import read_foreign
from cratescope.sae.learner import FIRST_THRESHOLD, Learner, Plan

PYTHON = os.environ.get("SAE_PYTHON", "")
needs_theirs = pytest.mark.skipif(not PYTHON, reason="SAE_PYTHON names no Python with sae-lens")
D, M, K, B, STEPS = 24, 96, 4, 128, 50
PENALTIES = {"relu": 0.4, "jumprelu": 0.2}
KINDS = ("relu", "topk", "batchtopk", "jumprelu")

TRAIN = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig, LoggingConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
torch.set_num_threads(1)
folder, told = Path(sys.argv[1]), json.loads(sys.argv[2])
kind, k, steps, batch = told["kind"], told["k"], told["steps"], told["batch"]
start = load_file(folder / "start.safetensors")
d, m = start["W_enc"].shape
size = dict(d_in=d, d_sae=m, apply_b_dec_to_input=True)
top = dict(k=k, aux_loss_coefficient=told["aux"], rescale_acts_by_decoder_norm=False)
sae = {
    "relu": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(**size, l1_coefficient=told["penalty"])),
    "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**size, **top)),
    "batchtopk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, **top)),
    "jumprelu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(
        **size, l0_coefficient=told["penalty"], jumprelu_bandwidth=told["bandwidth"],
        jumprelu_init_threshold=told["threshold"])),
}[kind]()
with torch.no_grad():
    for name, value in start.items():
        getattr(sae, name).copy_(value)

def leave_norms(weight):  # what ours does and SAELens does not: norms of decoder rows are no freedom
    weight.grad -= (weight.grad * weight).sum(1, keepdim=True) * weight

sae.W_dec.register_post_accumulate_grad_hook(leave_norms)
batches = load_file(folder / "batches.safetensors")["x"]
config = SAETrainerConfig(
    total_training_samples=steps * batch, train_batch_size_samples=batch, lr=told["lr"], lr_end=told["lr"],
    lr_scheduler_name="constant", lr_warm_up_steps=0, lr_decay_steps=0, n_restart_cycles=1, adam_beta1=0.9,
    adam_beta2=0.999, device="cpu", autocast=False, dead_feature_window=told["dead_after"] - 1,
    feature_sampling_window=10**6, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
    n_batches_for_norm_estimate=1, logger=LoggingConfig(log_to_wandb=False))
trainer = SAETrainer(config, sae, iter(batches))
losses = []
for x in batches:
    losses.append(trainer.step(x).loss.item())
    trainer.n_training_steps += 1
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
found = {name: getattr(sae, name).detach().contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
if kind == "jumprelu":
    found["threshold"] = sae.threshold.detach().clamp(min=0)
save_file(found | {"losses": torch.tensor(losses)}, folder / "end.safetensors")
sae.save_inference_model(str(folder / "saved"))
loaded, x = SAE.load_from_disk(str(folder / "saved")), batches[0]
with torch.no_grad():
    z = loaded.encode(x)
    found = {"x": x, "z": z, "y": loaded.decode(z)}
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "saved.safetensors")
"""

LOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folder = Path(sys.argv[1])
sae, x = SAE.load_from_disk(str(folder / "ours")), load_file(folder / "x.safetensors")["x"]
with torch.no_grad():
    save_file({"z": sae.encode(x), "y": sae.decode(sae.encode(x))}, folder / "theirs.safetensors")
"""

SPARSIFY = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig
folder, d, m, k = Path(sys.argv[1]), *map(int, sys.argv[2:])
x = load_file(folder / "x.safetensors")["x"]
torch.manual_seed(0)
coder = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k))
with torch.no_grad():
    coder.b_dec.normal_()
    coder.encoder.bias.normal_()
    coder.save_to_disk(folder / "theirs")
    save_file({"y": coder(x).sae_out}, folder / "y.safetensors")
"""


def theirs(code: str, folder: Path, *arguments: str) -> None:
    told = subprocess.run([PYTHON, "-c", code, str(folder), *arguments], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]


def activations(n: int, seed: int) -> torch.Tensor:
    """Some of a random dictionary's atoms each, so that there is something to learn."""
    chance = torch.Generator().manual_seed(seed)
    atoms = torch.randn(60, D, generator=torch.Generator().manual_seed(99))
    return (torch.rand(n, 60, generator=chance) * (torch.rand(n, 60, generator=chance) < 0.06)) @ atoms


@needs_theirs
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_weights_follow_saelens(kind, tmp_path):
    config = CoderConfig(kind, D, M, K, PENALTIES.get(kind, 0.0), bandwidth=0.3, aux=0.5)
    plan = Plan(STEPS, 1e-3, warmup=0, decay=0, dead_after=8)
    learner = Learner(SparseCoder(config, seed=3), plan)
    coder = learner.coder
    with torch.no_grad():
        coder.encoder_bias[:20] = -3 * (
            "topk" in kind
        )  # silent at first, so that AuxK has more than half of D to choose from
    start = {"W_enc": coder.encoder.T, "b_enc": coder.encoder_bias, "W_dec": coder.decoder, "b_dec": coder.bias}
    save_file({name: value.detach().contiguous() for name, value in start.items()}, tmp_path / "start.safetensors")
    x = activations(STEPS * B, 0).view(STEPS, B, D)
    save_file({"x": x}, tmp_path / "batches.safetensors")
    told = {"kind": kind, "k": K, "steps": STEPS, "batch": B, "lr": 1e-3, "aux": 0.5, "dead_after": 8}
    told |= {"penalty": config.penalty, "bandwidth": 0.3, "threshold": FIRST_THRESHOLD}
    theirs(TRAIN, tmp_path, json.dumps(told))
    end = load_file(tmp_path / "end.safetensors")
    learner._resample = lambda *_: None  # SAELens has none
    losses, dead = [], 0.0
    for batch in x:
        dead = max(dead, learner.dead_share)
        losses.append(learner.step(batch).loss)
    assert "topk" not in kind or dead * M > D / 2, "AuxK has to choose"
    assert losses == pytest.approx(end["losses"].tolist(), rel=1e-4)
    for name, ours in start.items():
        gap = float((ours.detach() - end[name]).norm() / end[name].norm())
        assert gap < 1e-4, (name, gap)
    if kind == "jumprelu":
        assert float((coder.threshold.detach() - end["threshold"]).norm() / end["threshold"].norm()) < 1e-4
    saved, loaded = load_file(tmp_path / "saved.safetensors"), read_foreign(tmp_path / "saved").coder(Origin())
    assert saved["z"].any() and torch.allclose(loaded.encode(saved["x"]), saved["z"], atol=1e-5)
    assert torch.allclose(loaded(saved["x"]), saved["y"], atol=1e-5)


@needs_theirs
@pytest.mark.slow
@pytest.mark.parametrize("kind", (*KINDS, "matryoshka"))
def test_saelens_loads_ours_and_reconstructs_the_same(kind, tmp_path):
    coder = SparseCoder(CoderConfig(kind, D, M, K, prefixes=(32,)), Origin("m", "0" * 64, "mlp", "h.{layer}.mlp", 2))
    coder.requires_grad_(False)
    coder.bias.normal_()
    coder.encoder_bias.normal_()
    coder.threshold.uniform_(0.1, 0.5).mul_(kind not in ("relu", "topk"))
    x = activations(200, 1)
    save_coder(tmp_path / "ours", coder)
    save_file({"x": x}, tmp_path / "x.safetensors")
    theirs(LOAD, tmp_path)
    found = load_file(tmp_path / "theirs.safetensors")
    assert torch.allclose(found["z"], coder.encode(x), atol=1e-5)
    assert torch.allclose(found["y"], coder(x), atol=1e-5)


@needs_theirs
@pytest.mark.slow
def test_what_sparsify_saves_reconstructs_the_same_here(tmp_path):
    save_file({"x": activations(200, 1)}, tmp_path / "x.safetensors")
    theirs(SPARSIFY, tmp_path, str(D), str(M), str(K))
    coder = read_foreign(tmp_path / "theirs").coder(Origin()).requires_grad_(False)
    wanted = load_file(tmp_path / "y.safetensors")["y"]
    assert torch.allclose(coder(activations(200, 1)), wanted, atol=1e-5)
