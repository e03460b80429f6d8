"""Training learns, follows the recipe, and refuses what does not fit."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import SMALL_TRAINING
from cratescope.errors import UserError
from cratescope.files import read_jsonl
from cratescope.lm.config import EvaluateConfig, TrainConfig
from cratescope.lm.evaluate import crop_losses, evaluate, reconstruction
from cratescope.lm.load import load_model
from cratescope.lm.train import train
from cratescope.models.presets import build, preset_config
from cratescope.neurons.sites import hooked, site_named
from cratescope.run import Run
from cratescope.text.crops import Crops
from cratescope.text.shards import TokenData


def config_of(out, data_folder, **changes):
    return TrainConfig(out, data_folder, **({"preset": "crate-1l"} | SMALL_TRAINING | changes))


def test_the_loss_falls_and_is_logged_with_validation(data_folder, tmp_path):
    run = train(config_of(tmp_path / "run", data_folder, steps=40, learning_rate=5e-3, validate_every=20))
    rows = read_jsonl(run.metrics)
    losses = [row["loss"] for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row]
    assert len(losses) == 40 and losses[-1] < losses[0] - 0.5
    assert losses[0] == pytest.approx(math.log(320), abs=0.3)
    assert [row["step"] for row in validation] == [20, 40]
    assert validation[1]["validation_loss"] < validation[0]["validation_loss"]
    assert rows[-1]["tokens"] == 40 * 128


def test_the_first_logged_loss_is_the_mean_over_the_crops_of_the_first_step(runs_folder, data_folder):
    data = TokenData.open(data_folder)
    model = build(preset_config("crate-1l", data.vocab_size, 32, data.eos_id), seed=0)
    crops = Crops("random", data.split("train"), 32, seed=0, length=4)
    first = crop_losses(model, np.stack([crops[i]["input_ids"] for i in range(4)])).mean(1)
    logged = read_jsonl(Run(runs_folder / "crate").metrics)[0]
    assert logged["loss"] == pytest.approx(first.mean(), abs=1e-5)


def test_the_learning_rate_warms_up_and_ends_at_its_minimum(runs_folder):
    rates = [row["learning_rate"] for row in read_jsonl(Run(runs_folder / "crate").metrics) if "loss" in row]
    assert max(rates) == pytest.approx(3e-3) and rates.index(max(rates)) in (1, 2)
    assert rates[-1] < 4e-4


@pytest.mark.parametrize("preset", ["crate-1l", "crate-h-lag-1l", "gpt2-1l"])
def test_weight_decay_is_on_matrices_only_and_includes_the_dictionary(preset):
    from transformers import Trainer

    from cratescope.lm.trainer import WatchedTrainer

    model = build(preset_config(preset, 64, 8, 0), seed=0)
    decayed = WatchedTrainer.get_decay_parameter_names(None, model)
    assert {model.get_parameter(name) for name in decayed} == {p for p in model.parameters() if p.dim() >= 2}
    assert ("transformer.h.0.ista.D" in decayed) == preset.startswith("crate")
    if "lag" not in preset:
        usual = Trainer.get_decay_parameter_names(None, model)
        assert {model.get_parameter(name) for name in usual} == {model.get_parameter(name) for name in decayed}


def test_crops_depend_on_seed_and_index_alone(data_folder):
    split = TokenData.open(data_folder).split("train")
    crops = Crops("random", split, 32, seed=3, length=100)
    again = Crops("random", split, 32, seed=3, length=1000)
    assert all(np.array_equal(crops[i]["input_ids"], again[i]["input_ids"]) for i in (0, 7, 99))
    assert not np.array_equal(crops[0]["input_ids"], Crops("random", split, 32, 4, 100)[0]["input_ids"])
    assert len({crops[i]["input_ids"].tobytes() for i in range(100)}) > 90


def test_finished_training_is_not_done_again(runs_folder, data_folder):
    before = Run(runs_folder / "crate").manifest.stat().st_mtime_ns
    train(config_of(runs_folder / "crate", data_folder))
    assert Run(runs_folder / "crate").manifest.stat().st_mtime_ns == before


def test_zero_steps_write_the_untrained_control(data_folder, tmp_path):
    run = train(config_of(tmp_path / "run", data_folder, steps=0, seed=5))
    model = AutoModelForCausalLM.from_pretrained(run.model)
    fresh = build(preset_config("crate-1l", 320, 32, 0), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert run.read_manifest()["arm"]["tokens_trained"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_tokens": 100},
            "batch_tokens = 100 is not a multiple of micro_batch x context x processes = 2 x 32 x 1 = 64",
        ),
        ({"save_every": 3, "log_every": 2}, "--save-every 3: is not a multiple of --log-every 2"),
        ({"context": 100_000, "batch_tokens": 200_000}, "fewer than one crop of 100000"),
        ({"preset": "crate-9l"}, "no preset 'crate-9l'"),
        ({"keep": 1}, "--keep 1: has to be 2 or more"),
        ({"milestones": (0.5, 1.5)}, "--milestones 1.5: has to be 1 or less"),
        ({"workers": -1}, "--workers -1: has to be 0 or more"),
        ({"fsdp": True}, "fsdp shards over several GPUs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data_folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(config_of(tmp_path / "run", data_folder, **changes))


def test_a_run_directory_of_another_model_is_refused(runs_folder, data_folder):
    said = "was made with preset = 'crate-1l', not 'gpt2-1l'; its model is trained already; use it as it is, or name"
    with pytest.raises(UserError, match=said):
        train(config_of(runs_folder / "crate", data_folder, preset="gpt2-1l"))


def test_the_folder_of_a_model_trained_elsewhere_is_refused_and_left_alone(runs_folder, data_folder, tmp_path):
    shutil.copytree(runs_folder / "crate", tmp_path / "run", ignore=shutil.ignore_patterns("manifest.json"))
    with pytest.raises(UserError, match="run: holds a model that was not trained there; use it as it is, or name"):
        train(config_of(tmp_path / "run", data_folder))
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_refused_command_does_not_claim_the_folder_for_its_mistake(data_folder, tmp_path):
    for mistake in ({"batch_tokens": 100}, {"preset": "crate-9l"}, {"crate": {"ista_steps": "0"}}, {"steps": -1}):
        with pytest.raises(UserError):
            train(config_of(tmp_path / "run", data_folder, **mistake))
    assert train(config_of(tmp_path / "run", data_folder, steps=0)).manifest.exists()


def test_batch_tokens_are_shared_out_over_the_processes(data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="micro_batch x context x processes = 2 x 32 x 3 = 192; change one of them"):
        train(config_of(tmp_path / "run", data_folder))


def test_a_logger_that_is_not_installed_is_named(data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to trackio: the package is not installed; run `pip install trackio`"):
        train(config_of(tmp_path / "run", data_folder, report_to=("trackio",)))


def test_a_milestone_is_a_run_of_its_own_and_is_never_rotated_away(runs_folder, data_folder, tmp_path):
    run = train(config_of(tmp_path / "crate", data_folder, milestones=(0.25, 0.4, 1.0)))
    assert sorted(path.name for path in (run.root / "milestones").iterdir()) == ["step-000002", "step-000003"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    milestone = run.milestone(3)
    manifest = milestone.read_manifest()
    assert (manifest["steps"], manifest["arm"]["tokens_trained"], milestone.name) == (3, 3 * 128, "crate-step-000003")
    assert [row["step"] for row in read_jsonl(milestone.metrics)] == [1, 2, 3]
    result = evaluate(EvaluateConfig(milestone.root, crops=6, device="cpu"))
    ends = [evaluate(EvaluateConfig(r.root, crops=6, device="cpu"))["loss"] for r in (run.milestone(2), run)]
    assert ends[0] > result["loss"] > ends[1]
    undisturbed = load_file(Run(runs_folder / "crate").model / "model.safetensors")
    assert all(torch.equal(w, undisturbed[n]) for n, w in load_file(run.model / "model.safetensors").items())


def test_the_penalty_makes_activations_fewer_and_is_part_of_the_arm(data_folder, tmp_path):
    density = {}
    for name, l1 in (("plain", None), ("penalised", 0.05)):
        run = train(config_of(tmp_path / name, data_folder, preset="gpt2-1l", steps=40, l1=l1))
        density[name] = (neurons_of(run, data_folder) > 0).float().mean()
        assert run.read_manifest()["arm"]["variant"] == ("" if l1 is None else "l1=0.05")
    assert density["penalised"] < density["plain"] / 2
    with pytest.raises(UserError, match="was made with l1 = 0.05"):
        train(config_of(tmp_path / "penalised", data_folder, preset="gpt2-1l", steps=40))


def test_sparse_codes_are_penalised_by_their_preset(data_folder, tmp_path):
    sums, fixed = {}, {"homeostasis_rate": "0"}  # or thresholds would fall where the penalty silences atoms
    for penalty, changes in (
        ("preset", {"crate": fixed}),
        ("none", {"crate": fixed | {"code_penalty": "0"}}),
        ("more", {"crate": fixed, "l1": 0.02}),
    ):
        run = train(config_of(tmp_path / penalty, data_folder, preset="crate-h-1l", steps=30, **changes))
        sums[penalty] = neurons_of(run, data_folder).sum()
        assert all(f"{name}=" in run.read_manifest()["arm"]["variant"] for name in changes["crate"])
    assert sums["more"] < sums["preset"] < sums["none"]


def test_codes_learn_to_reconstruct_where_the_penalty_asks_for_it(data_folder, tmp_path):
    explained = []
    for weight in ("0", "20"):
        how = {"l1": 0.01, "crate": {"reconstruction_weight": weight}, "steps": 60}
        run = train(config_of(tmp_path / weight, data_folder, preset="crate-h-1l", **how))
        crops = TokenData.open(data_folder).split("validation").spaced(8, 16)
        explained += reconstruction(load_model(run, "cpu"), crops)
    assert explained[1] > explained[0] + 0.05
    with pytest.raises(UserError, match="reconstruction_weight: weighs within a penalty, and there is none"):
        train(config_of(tmp_path / "none", data_folder, preset="crate-1l", crate={"reconstruction_weight": "1"}))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("preset", ["crate-h-1l", "gpt2-1l"])
def test_losses_leave_the_penalty_out(data_folder, tmp_path, preset):
    """Of weights that hardly move, so that the penalty changes nothing but what is added to the loss."""
    still = {"learning_rate": 1e-12, "min_learning_rate": 1e-12, "steps": 4}
    losses = []
    for name, changes in (("without", {}), ("with", {"l1": 1.0})):
        run = train(config_of(tmp_path / name, data_folder, preset=preset, **still, **changes))
        losses.append([row["loss"] for row in read_jsonl(run.metrics) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert neurons_of(run, data_folder).sum(-1).mean() > 0.02


def neurons_of(run, data_folder):
    """The first layer's activations (8, 16, h) on validation text."""
    model, seen = load_model(run, "cpu"), []
    tokens = torch.from_numpy(TokenData.open(data_folder).split("validation").spaced(8, 16).astype("int64"))
    with hooked(model, site_named("auto", model), [0], lambda _, activations: seen.append(activations)):
        model(tokens)
    return seen[0]


def test_speed_and_utilisation_are_logged(runs_folder):
    rows = [row for row in read_jsonl(Run(runs_folder / "gpt2").metrics) if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and 0 < row["utilisation"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("preset", "crate"),
    [
        ("crate-2l", {"ista_steps": "1"}),
        ("crate-2l", {"ista_steps": "3"}),
        ("gpt2-2l", {}),
        ("crate-h-lag-2l", {"ista_steps": "2"}),
        ("crate-h-lag-2l", {"bilinear": "true"}),
        ("gpt2-h-2l", {}),
        ("gpt2-lag-2l", {}),
    ],
)
def test_the_floating_point_operations_of_a_step_are_counted_right(preset, crate):
    from torch.utils.flop_counter import FlopCounterMode

    from cratescope.models.cost import flops_per_token

    config = preset_config(preset, 320, 48, 0, crate)
    config._attn_implementation = "eager"  # the counter does not know the fused attention of CPUs
    tokens = torch.randint(320, (2, 48))
    with FlopCounterMode(display=False) as counter:
        build(config, 0).eval()(tokens, labels=tokens).loss.backward()  # eval: the plain loop, which it sees all of
    assert counter.get_total_flops() == pytest.approx(tokens.numel() * flops_per_token(config, 48), rel=0.02)


def test_the_peak_of_matrix_products_is_measured_in_under_a_second():
    from cratescope.hardware import gemm_peak

    start = time.monotonic()
    assert gemm_peak(torch.device("cpu"), torch.float32) > 1e9
    assert time.monotonic() - start < 1


def test_a_run_names_its_data_by_a_path_that_leads_there(runs_folder, data_folder):
    run = Run(runs_folder / "crate")
    assert run.data_path().samefile(data_folder) and not Path(run.read_manifest()["data"]["path"]).is_absolute()
