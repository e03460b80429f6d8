"""Training learns, follows the recipe, and loses nothing when killed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import SMALL_TRAINING
from cratescope.config import EvaluateConfig, TrainConfig
from cratescope.lm.data import TokenData
from cratescope.lm.evaluate import crop_losses, evaluate, mean_loss, unigram_entropy
from cratescope.lm.train import RandomCrops, last_whole_checkpoint, train
from cratescope.run import Run, UserError, read_json, read_jsonl


def config_of(out, data_folder, **changes):
    return TrainConfig(out, data_folder, **({"preset": "crate-1l"} | SMALL_TRAINING | changes))


def arguments_of(config):
    """The command line of a configuration."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("out", "crate"):
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return ["train", str(config.out), *flags]


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
    from cratescope.models.presets import build, preset_config

    data = TokenData.open(data_folder)
    model = build(preset_config("crate-1l", data.vocab_size, 32, data.eos_id), seed=0)
    crops = RandomCrops(data.split("train"), 32, seed=0, length=4)
    first = crop_losses(model, np.stack([crops[i]["input_ids"] for i in range(4)]))
    logged = read_jsonl(Run(runs_folder / "crate").metrics)[0]
    assert logged["loss"] == pytest.approx(first.mean(), abs=1e-5)


def test_the_learning_rate_warms_up_and_ends_at_its_minimum(runs_folder):
    rates = [row["learning_rate"] for row in read_jsonl(Run(runs_folder / "crate").metrics) if "loss" in row]
    assert max(rates) == pytest.approx(3e-3) and rates.index(max(rates)) in (1, 2)
    assert rates[-1] < 4e-4


def test_weight_decay_is_on_matrices_only_and_includes_the_dictionary():
    from transformers import Trainer

    from cratescope.models.presets import build, preset_config

    model = build(preset_config("crate-1l", 64, 8, 0), seed=0)
    decayed = Trainer.get_decay_parameter_names(None, model)
    assert {model.get_parameter(name) for name in decayed} == {p for p in model.parameters() if p.dim() >= 2}
    assert "transformer.h.0.ista.D" in decayed


def test_crops_depend_on_seed_and_index_alone(data_folder):
    split = TokenData.open(data_folder).split("train")
    crops = RandomCrops(split, 32, seed=3, length=100)
    again = RandomCrops(split, 32, seed=3, length=1000)
    assert all(np.array_equal(crops[i]["input_ids"], again[i]["input_ids"]) for i in (0, 7, 99))
    assert not np.array_equal(crops[0]["input_ids"], RandomCrops(split, 32, 4, 100)[0]["input_ids"])
    assert len({crops[i]["input_ids"].tobytes() for i in range(100)}) > 90


def test_finished_training_is_not_done_again(runs_folder, data_folder):
    before = Run(runs_folder / "crate").manifest.stat().st_mtime_ns
    train(config_of(runs_folder / "crate", data_folder))
    assert Run(runs_folder / "crate").manifest.stat().st_mtime_ns == before


def test_zero_steps_write_the_untrained_control(data_folder, tmp_path):
    from cratescope.models.presets import build, preset_config

    run = train(config_of(tmp_path / "run", data_folder, steps=0, seed=5))
    model = AutoModelForCausalLM.from_pretrained(run.model)
    fresh = build(preset_config("crate-1l", 320, 32, 0), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert run.read_manifest()["tokens_trained"] == 0


def test_killed_at_any_moment_the_same_command_ends_with_the_same_losses_and_weights(data_folder, tmp_path):
    whole = train(config_of(tmp_path / "whole", data_folder, steps=60, save_every=5))
    config = config_of(tmp_path / "killed", data_folder, steps=60, save_every=5)
    run = Run(config.out)
    command = [sys.executable, "-m", "cratescope", *arguments_of(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 90
    while not any(row["step"] > 12 for row in read_jsonl(run.metrics)) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not run.manifest.exists(), "the run ended before the kill"
    assert last_whole_checkpoint(run.checkpoints) is not None
    train(config)
    assert run.metrics.read_text() == whole.metrics.read_text()
    killed, undisturbed = (load_file(r.model / "model.safetensors") for r in (run, whole))
    assert all(torch.equal(killed[name], undisturbed[name]) for name in undisturbed)


def test_a_checkpoint_cut_short_is_passed_over(tmp_path, capsys):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"12345678")
        (folder / "whole.json").write_text(json.dumps({"model.safetensors": 8}))
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"123")
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"
    assert "checkpoint-10 was cut short" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_tokens": 100},
            "batch_tokens = 100 is no multiple of micro_batch x context = 2 x 32 = 64",
        ),
        ({"save_every": 3, "log_every": 2}, "save_every = 3 is no multiple of log_every = 2"),
        ({"context": 100_000, "batch_tokens": 200_000}, "fewer than one crop of 100000"),
        ({"preset": "crate-9l"}, "no preset 'crate-9l'"),
        ({"keep": 1}, "at least 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data_folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(config_of(tmp_path / "run", data_folder, **changes))


def test_a_run_directory_of_another_model_is_refused(runs_folder, data_folder):
    with pytest.raises(UserError, match="was made with preset = 'crate-1l', not 'gpt2-1l'"):
        train(config_of(runs_folder / "crate", data_folder, preset="gpt2-1l"))


def test_evaluate_gives_the_mean_loss_with_its_error_and_the_entropy_to_beat(runs_folder, data_folder):
    run = Run(runs_folder / "gpt2")
    result = evaluate(EvaluateConfig(run.root, crops=6, device="cpu"))
    data = TokenData.open(data_folder)
    split = data.split("validation")
    model = AutoModelForCausalLM.from_pretrained(run.model)
    losses = []
    for crop in split.spaced(6, 32):
        tokens = torch.from_numpy(crop)[None]
        losses.append(model(tokens, labels=tokens).loss.item())
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["standard_error"] == pytest.approx(np.std(losses, ddof=1) / math.sqrt(6), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(
        result["loss"] / math.log(2) * split.n_tokens / split.n_bytes, rel=1e-9
    )
    counts = np.bincount(split.window(0, split.n_tokens))
    p = counts[counts > 0] / counts.sum()
    assert result["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum())
    assert [e["prompt"] for e in result["examples"]][0] == "They saw some boats on the"
    assert all(len(e["top"]) == 5 and e["continuation"] for e in result["examples"])
    assert read_json(run.evaluation) == result


def test_the_unigram_entropy_is_that_of_a_coin(tmp_path):
    from cratescope.lm.data import TokenSplit

    split = TokenSplit("x", (np.array([0, 1, 0, 1], dtype=np.uint16),), 4)
    assert unigram_entropy(split, 2) == pytest.approx(math.log(2))


def test_the_standard_error_is_over_crops():
    loss = mean_loss(np.array([1.0, 2.0, 3.0]), context=11)
    assert (loss.mean, loss.n_tokens) == (2.0, 30)
    assert loss.standard_error == pytest.approx(1 / math.sqrt(3))


def test_a_refused_command_does_not_claim_the_folder_for_its_mistake(data_folder, tmp_path):
    for mistake in ({"batch_tokens": 100}, {"preset": "crate-9l"}, {"crate": {"ista_steps": "0"}}, {"steps": -1}):
        with pytest.raises(UserError):
            train(config_of(tmp_path / "run", data_folder, **mistake))
    assert train(config_of(tmp_path / "run", data_folder, steps=0)).manifest.exists()


def test_an_evaluation_of_other_data_is_not_answered_from_the_old_one(runs_folder, text_folder, tmp_path):
    from cratescope.config import PrepareConfig
    from cratescope.lm.data import prepare

    run = Run(shutil.copytree(runs_folder / "crate", tmp_path / "crate"))
    options = PrepareConfig(str(text_folder), tmp_path / "data", "bpe:320", validation=0.2, heldout=0.3, seed=1)
    prepare(options)
    shutil.copytree(tmp_path / "data", tmp_path / "same")
    first = evaluate(EvaluateConfig(run.root, tmp_path / "data", crops=4, device="cpu"))
    split = evaluate(EvaluateConfig(run.root, tmp_path / "data", split="heldout", crops=4, device="cpu"))
    assert first["loss"] != split["loss"]
    prepare(dataclasses.replace(options, out=tmp_path / "other", seed=2))
    other = evaluate(EvaluateConfig(run.root, tmp_path / "other", crops=4, device="cpu"))
    assert other["loss"] != first["loss"]


def test_one_crop_has_no_standard_error():
    assert mean_loss(np.array([1.5]), context=11).standard_error is None


def test_several_processes_are_refused(data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes"):
        train(config_of(tmp_path / "run", data_folder))
