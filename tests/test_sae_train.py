"""Training sparse autoencoders: the stream, resumption, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import processes
from cratescope.cli import run_and_exit
from cratescope.errors import Stopped, UserError
from cratescope.models.sae import SparseCoder, load_coder
from cratescope.run import Run
from cratescope.sae import train as training
from cratescope.sae.config import SaeConfig
from cratescope.sae.train import Job, settings_of, train_coders
from cratescope.text.shards import TokenData, TokenSplit

SMALL = {"tokens": 640, "batch": 32, "buffer": 128, "expansion": 1, "k": 4, "log_every": 2, "save_every": 3}
SMALL |= {"dead_tokens": 96, "batch_size": 2, "device": "cpu", "dtype": "float32", "site": "residual"}


@pytest.fixture
def run(runs_folder, tmp_path):
    """A trained run of this test's own, beside its data."""
    shutil.copytree(runs_folder / "crate", tmp_path / "crate")
    return tmp_path / "crate"


def learned(run, data, **changed):
    return train_coders(SaeConfig(run, **{**SMALL, "data": data, **changed}))


def contents(folder):
    """Bytes of every file but the log, whose speeds differ, and the log without them."""
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    log = files.pop(next(path for path in files if path.name == "metrics.jsonl"))
    return files, [{**json.loads(line), "tokens_per_second": 0} for line in log.splitlines()]


@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_a_trained_coder_explains_activations_better_than_their_mean(kind, run, data_folder):
    (folder,) = learned(run, data_folder, kind=kind, name=kind, penalty=0.01, tokens=1600, learning_rate=1e-2)
    coder = load_coder(folder / "layer-00")
    assert coder.config.kind == kind and coder.origin.pattern == "transformer.h.{layer}"
    assert torch.allclose(coder.decoder.norm(dim=1), torch.ones(coder.config.width), atol=1e-5)
    _, log = contents(folder)
    assert log[-1]["step"] == 50 and log[-1]["explained_variance"] > max(0.1, log[0]["explained_variance"])
    assert not (folder / "checkpoints").exists()


def test_a_frozen_decoder_stays_as_random_as_it_was(run, data_folder):
    free, frozen = learned(run, data_folder, name="c", grid=("kind=batchtopk,frozen",), seed=3)
    free, frozen = (load_coder(folder / "layer-00") for folder in (free, frozen))
    at_first = SparseCoder(frozen.config, seed=3000)
    assert frozen.config.frozen and not free.config.frozen and frozen.config.kind == "batchtopk"
    assert torch.equal(frozen.decoder, at_first.decoder) and not torch.equal(frozen.encoder, at_first.encoder)
    assert not torch.allclose(free.decoder, at_first.decoder)


def test_the_controls_that_learn_nothing_lose_nothing(run, data_folder):
    folders = learned(run, data_folder, name="c", grid=("kind=identity,rotation",))
    identity, rotation = (load_coder(folder / "layer-00") for folder in folders)
    (x,) = Job.of(SaeConfig(run, **SMALL, data=data_folder)).stream().read(0).values()
    with torch.no_grad():
        assert torch.equal(identity.encode(x)[:, : x.shape[1]], x.relu()) and torch.equal(identity(x), x)
        assert torch.allclose(rotation(x), x, atol=1e-4)
        codes = rotation.encode(x)
    assert torch.allclose(codes.square().sum(1), (x - rotation.bias).square().sum(1), rtol=1e-4)
    assert not torch.allclose(codes[:, : x.shape[1]], identity.encode(x)[:, : x.shape[1]], atol=0.1)


def test_the_saved_coder_reconstructs_the_activations_in_their_own_units(run, data_folder):
    (folder,) = learned(run, data_folder, tokens=3200, learning_rate=1e-2)
    job = Job.of(SaeConfig(run, **SMALL, data=data_folder))
    coder = load_coder(folder / "layer-00")
    (x,) = job.stream().read(0).values()
    with torch.no_grad():
        error = (coder(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert 1 - float(error) == pytest.approx(contents(folder)[1][-1]["explained_variance"], abs=0.15)
    assert float((coder.encode(x) > 0).sum(1).float().mean()) == pytest.approx(4, rel=0.5)


def test_a_grid_learns_what_each_setting_learns_alone(run, data_folder):
    folders = learned(run, data_folder, name="g", grid=("k=2,4", "kind=topk,relu"))
    assert [folder.name for folder in folders] == ["g-k2-topk", "g-k2-relu", "g-k4-topk", "g-k4-relu"]
    (alone,) = learned(run, data_folder, name="alone", kind="topk", k=2)
    together, single = (load_coder(folder / "layer-00").state_dict() for folder in (folders[0], alone))
    assert all(torch.equal(together[name], single[name]) for name in single)


def test_a_batch_holds_tokens_of_many_crops_and_every_token_once(run, data_folder):
    stream = Job.of(SaeConfig(run, **SMALL, data=data_folder)).stream()
    (whole,) = stream.read(0).values()
    batches = [batch[0] for batch, _ in zip(stream.batches(0), range(stream.batches_per_block), strict=False)]
    assert torch.equal(torch.cat(batches).sort(0).values, whole.sort(0).values)
    crops = [{int((whole == row).all(1).nonzero()[0]) // 32 for row in batch} for batch in batches]
    assert all(len(seen) > 2 for seen in crops)
    assert torch.equal(next(stream.batches(5))[0], [b for b, _ in zip(stream.batches(0), range(6), strict=False)][5][0])


@pytest.mark.parametrize("kind", ["batchtopk", "relu", "jumprelu"])
def test_a_training_killed_at_any_change_of_the_disk_ends_with_the_same_files(kind, run, data_folder, tmp_path):
    plain = run.parent / "undisturbed" / run.name
    shutil.copytree(run, plain)
    (wanted,) = learned(plain, data_folder, kind=kind)
    for change in (1, 4, 7, 9):
        processes.killed_before(change, lambda: learned(run, data_folder, kind=kind))
    (folder,) = learned(run, data_folder, kind=kind)
    files, log = contents(folder)
    plain_files, plain_log = contents(wanted)
    assert (files, log) == (plain_files, plain_log)


def test_a_signal_saves_the_step_and_the_same_command_resumes(run, data_folder, monkeypatch):
    plain = run.parent / "undisturbed" / run.name
    shutil.copytree(run, plain)
    (wanted,) = learned(plain, data_folder)
    learn, steps = training.Training.learn, []

    def interrupted(self, batch):
        learn(self, batch)
        steps.append(self.step)
        if len(steps) == 8:
            training.signal.raise_signal(training.signal.SIGTERM)

    monkeypatch.setattr(training.Training, "learn", interrupted)
    with pytest.raises(Stopped, match="after step 8, which is saved") as stop:
        learned(run, data_folder)
    assert stop.value.code == 143
    (folder,) = learned(run, data_folder)
    assert steps == [*range(1, 21)]
    assert contents(folder) == contents(wanted)


def test_finished_work_is_skipped_and_other_settings_are_refused(run, data_folder):
    (folder,) = learned(run, data_folder)
    before = contents(folder)
    assert learned(run, data_folder) == [folder] and contents(folder) == before
    with pytest.raises(UserError, match="was made with k = 4, not 5"):
        learned(run, data_folder, k=5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": 10_000}, "k = 10000 is more than the"),
        ({"name": "a/b"}, "give one without slashes"),
        ({"site": "nowhere"}, "no site 'nowhere'"),
        ({"layers": (7,)}, "layer 7 is out of range"),
        ({"context": 4096}, "longer than the 32 tokens"),
        ({"batch": 1000}, "is more than --buffer 128"),
        ({"grid": ("k=x",)}, "k takes numbers"),
        ({"grid": ("colour=red",)}, "give kind, expansion, k, penalty"),
        ({"grid": ("kind=gated",)}, "no kind 'gated'"),
        ({"grid": ("k=0",)}, "k has to be 1 or more"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(changed, said, run, data_folder):
    with pytest.raises(UserError, match=said) as refused:
        learned(run, data_folder, **changed)
    assert "\n" not in str(refused.value) and not (run / "saes").exists()


def test_a_text_shorter_than_a_crop_is_refused_before_anything_is_written(run, data_folder, monkeypatch):
    few = np.zeros(31, dtype=np.uint16)
    monkeypatch.setattr(TokenData, "split", lambda self, name: TokenSplit(name, (few,)))
    with pytest.raises(UserError, match="the train split has 31 tokens, fewer than one crop of 32; prepare more text"):
        learned(run, data_folder)
    assert not (run / "saes").exists()


def test_layers_of_several_widths_are_refused_and_one_of_them_is_learned(run, data_folder, monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    model.transformer.h[1].mlp = GPT2MLP(40, model.config)
    monkeypatch.setattr(training, "load_model", lambda *_: model)
    with pytest.raises(UserError, match=r"site mlp has several widths \(64 at layer 0, 40 at layer 1\); give --layers"):
        learned(run, data_folder, site="mlp")
    assert not (run / "saes").exists()
    (folder,) = learned(run, data_folder, site="mlp", layers=(1,))
    assert load_coder(folder / "layer-01").config.d_in == 40


def test_activations_of_a_model_of_nan_are_refused(run, data_folder, monkeypatch):
    model = Run(run).load_model()
    with torch.no_grad():
        model.transformer.h[0].ista.D[3, 5] = torch.nan
    monkeypatch.setattr(training, "load_model", lambda *_: model.eval())
    with pytest.raises(UserError, match="layer 0: neuron .* is nan"):
        learned(run, data_folder)


def test_the_command_line_trains_and_says_where(run, data_folder, capsys):
    options = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    run_and_exit(["sae", str(run), "--data", str(data_folder), "--name", "b4", "--kind", "topk", *options])
    assert capsys.readouterr().out.strip() == str(run / "saes" / "b4")


def test_a_grid_without_entries_is_the_setting_itself():
    assert [setting.name for setting in settings_of(SaeConfig("run", name="x"))] == ["x"]


def test_a_grid_of_what_is_brought_in_is_refused(run):
    with pytest.raises(UserError, match="--grid is of settings to learn, and --from brings in"):
        SaeConfig(run, source="elsewhere", grid=("k=1,2",))
