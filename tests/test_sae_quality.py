"""Quality of a sparse autoencoder: against brute force, and of autoencoders of which it is known."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from cratescope.cli import run as run_cli
from cratescope.errors import UserError
from cratescope.files import read_json
from cratescope.lm.config import EvaluateConfig
from cratescope.lm.evaluate import ratio
from cratescope.models.sae import CoderConfig, Origin, SparseCoder, save_coder
from cratescope.neurons.coded import CodedSite
from cratescope.neurons.sites import read_site, site_named
from cratescope.run import Run
from cratescope.sae import quality
from cratescope.sae.probing import Probing
from cratescope.sae.quality import Text, decoder_cosine, evaluate, measure
from cratescope.text.config import PrepareConfig
from cratescope.text.prepare import prepare
from cratescope.text.shards import TokenData

PATTERN = "transformer.h.{layer}.mlp.act"
WIDTH = 512


@pytest.fixture(scope="module")
def model(runs_folder):
    return Run(runs_folder / "gpt2").load_model().eval()


@pytest.fixture(scope="module")
def text(data_folder):
    return Text.of(TokenData.open(data_folder), 12, 24)


@pytest.fixture(scope="module")
def activations(model, text):
    with torch.no_grad(), read_site(model, site_named(PATTERN, model), [0]) as found:
        model(torch.from_numpy(text.tokens))
    return found[0].clone()


def coder_with(features=40, kind="relu", **weights):
    coder = SparseCoder(CoderConfig(kind, WIDTH, features, k=6), Origin(pattern=PATTERN))
    with torch.no_grad():
        for name, value in weights.items():
            getattr(coder, name).copy_(torch.as_tensor(value))
    return coder


def measured(model, coder, text, batch_size=8):
    (row,) = measure(model, CodedSite("sae/x", PATTERN, {0: coder}), text, batch_size)
    return row


def test_predicting_the_mean_explains_no_variance_and_recovers_nothing_of_mean_ablation(model, text, activations):
    mean = activations.flatten(0, 1).double().mean(0).float()
    row = measured(model, coder_with(encoder_bias=torch.full((40,), -1e9), bias=mean), text)
    assert row["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert row["loss_recovered_mean"] == pytest.approx(0, abs=1e-6)
    assert row["kl_recovered_mean"] == pytest.approx(0, abs=1e-6)
    assert row["loss_replaced"] == row["loss_mean"] and row["l0"] == 0 and row["dead"] == 1


def test_reconstructing_nothing_is_ablation_to_zero(model, text):
    row = measured(model, coder_with(encoder_bias=torch.full((40,), -1e9)), text)
    assert row["loss_replaced"] == row["loss_zero"] != row["loss"]
    assert row["kl_recovered_zero"] == 0 and row["explained_variance"] < 0


def test_the_activations_themselves_explain_and_recover_everything(model, text):
    coder = SparseCoder.of_axes(torch.eye(WIDTH), torch.zeros(WIDTH), Origin(pattern=PATTERN))
    row = measured(model, coder, text)
    assert row["explained_variance"] == 1 and row["mse"] == 0
    for name in ("loss_recovered_zero", "loss_recovered_mean", "kl_recovered_mean"):
        assert row[name] == pytest.approx(1, abs=1e-5)
    assert row["loss_replaced"] == pytest.approx(row["loss"], rel=1e-6) and abs(row["kl"]) < 1e-6


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_all_is_as_of_one_pass_over_all_tokens(kind, model, text, activations):
    coder = coder_with(kind=kind, encoder_bias=torch.linspace(-0.3, 0.1, 40))
    row, alone = measured(model, coder, text), measured(model, coder, text, batch_size=1)
    assert alone == {
        name: pytest.approx(value, rel=1e-5, abs=1e-7) if isinstance(value, float) else value
        for name, value in row.items()
    }
    x = activations.flatten(0, 1)
    with torch.no_grad():
        z = coder.encode(x)
        error = (coder.decode(z) - x).double().square().sum(1).numpy()
    spread = (x - x.mean(0)).double().square().sum(1).numpy()
    documents = text.documents.ravel()
    share, deviation = ratio(np.bincount(documents, error), np.bincount(documents, spread))
    assert row["explained_variance"] == pytest.approx(1 - share, rel=1e-4)
    assert row["explained_variance_error"] == pytest.approx(deviation, rel=1e-3)
    assert row["mse"] == pytest.approx(error.mean(), rel=1e-5)
    density = (z > 0).float().mean(0).numpy()
    assert row["l0"] == pytest.approx(density.sum(), rel=1e-6) and row["dead"] == pytest.approx((density == 0).mean())
    assert sum(row["density"]["counts"]) == (density > 0).sum()


def test_the_effect_on_predictions_is_that_of_the_reconstruction_in_its_place(model, text, activations):
    coder = coder_with(features=200, kind="topk")
    row = measured(model, coder, text)
    tokens = torch.from_numpy(text.tokens)
    with torch.no_grad():
        own = model(tokens).logits.log_softmax(-1)[:, :-1]
        handle = model.transformer.h[0].mlp.act.register_forward_hook(lambda module, inputs, out: coder(out))
        edited = model(tokens).logits.log_softmax(-1)[:, :-1]
        handle.remove()
    loss, replaced = (-part.gather(2, tokens[:, 1:, None]).mean().item() for part in (own, edited))
    assert row["loss"] == pytest.approx(loss, rel=1e-5) and row["loss_replaced"] == pytest.approx(replaced, rel=1e-5)
    assert row["kl"] == pytest.approx((own.exp() * (own - edited)).sum(-1).mean().item(), rel=1e-4, abs=1e-7)
    recovered = (row["loss_mean"] - replaced) / (row["loss_mean"] - loss)
    assert row["loss_recovered_mean"] == pytest.approx(recovered, rel=1e-3)


def test_the_cosine_of_decoder_rows_is_of_the_nearest_other_row():
    coder = coder_with(features=quality.ROWS + 30)
    rows = torch.nn.functional.normalize(coder.decoder.detach(), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-1)
    assert decoder_cosine(coder) == pytest.approx(float(cosines.amax(1).mean()), abs=1e-6)


def test_the_document_of_every_token_is_known(data_folder):
    data = TokenData.open(data_folder)
    text, eos = Text.of(data, 6, 40), data.eos_id
    for row, numbers in zip(text.tokens, text.documents, strict=True):
        steps = np.diff(numbers)
        assert np.array_equal(steps, (row[:-1] == eos).astype(int))


def test_text_in_which_every_document_is_a_part_is_not_probed(model, data_folder):
    text = Text.of(TokenData.open(data_folder), 6, 24)
    assert len(np.unique(text.parts)) == text.n_documents
    assert measured(model, coder_with(), text)["probing"] is None


def test_documents_know_which_source_they_are_from(tmp_path):
    words = {"fish": "herring cod eel", "tree": "oak ash elm"}
    for name, said in words.items():
        lines = "\n".join(f'{{"text": "{said} {name} {number}"}}' for number in range(60))
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = prepare(
        PrepareConfig(str(tmp_path / "text"), tmp_path / "data", tokenizer="bpe:300", validation=0.3, heldout=0.2)
    )
    for split in ("train", "validation", "heldout"):
        names, part = data.parts(split)
        tokens = data.split(split).window(0, data.split(split).n_tokens)
        documents = data.tokenizer.decode(tokens).split(data.tokenizer.eos_token)[:-1]
        assert len(documents) == len(part)
        assert all(names[number].removesuffix(".jsonl") in said for number, said in zip(part, documents, strict=True))


def planted_probing(rng, telling, width=12, n_documents=40, crops=80, context=16):
    """Codes in which feature `telling` is active in the text of part 1 only; all others are noise."""
    documents = np.sort(rng.integers(0, n_documents, crops))[:, None].repeat(context, 1)
    documents[1::2] += n_documents  # what is read second are other documents
    parts = np.arange(2 * n_documents) % 2
    probing = Probing(width, documents, parts, torch.device("cpu"))
    for start in (0, 1):
        for crop in range(start, crops, 2):
            z = torch.from_numpy(rng.random((context, width))).float()
            if telling is not None:
                z[:, telling] = float(parts[documents[crop, 0]]) * (0.5 + z[:, telling])
            probing.add(z, np.array([crop]))
    return probing.result()


def test_probing_finds_the_feature_that_tells_the_part(rng):
    found = planted_probing(rng, telling=7)
    assert found["k1"] == found["k5"] == 1 and found["k1_error"] == 0 and found["parts"] == 2


def test_probing_noise_is_right_in_half_of_the_cases_within_its_error(rng):
    found = [planted_probing(rng, telling=None) for _ in range(20)]
    for k in ("k1", "k5"):
        apart = [(one[k] - one["chance"]) / one[f"{k}_error"] for one in found]
        assert abs(np.mean(apart)) < 0.8 and 0.6 < np.std(apart) < 1.6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def run(runs_folder, tmp_path):
    shutil.copytree(runs_folder / "gpt2", tmp_path / "gpt2", ignore=shutil.ignore_patterns("records", "saes"))
    run = Run(tmp_path / "gpt2")
    coder = coder_with()
    about = Origin(model_sha256=run.fingerprint(), pattern=PATTERN)
    for name in ("a", "b"):
        save_coder(run.saes(name) / "layer-00", SparseCoder(coder.config, about))
    return run


def test_evaluate_writes_the_quality_of_each_autoencoder_once(run, data_folder, monkeypatch):
    config = EvaluateConfig(run.root, data_folder, sae=("a", "b"), crops=8, context=16, device="cpu")
    first = evaluate(config)
    assert [row["layer"] for row in first["saes"]["b"]] == [0] and "loss" in first
    kept = read_json(run.saes("a") / "quality.json")
    assert kept["layers"] == first["saes"]["a"] and kept["settings"]["crops"] == 8
    with monkeypatch.context() as patch:
        patch.delattr(quality, "measure")
        assert evaluate(config) == first
    assert evaluate(EvaluateConfig(run.root, data_folder, sae=("a",), crops=4, context=16, device="cpu")) != first
    said = run_cli(["evaluate", str(run.root), "--data", str(data_folder), "--sae", "a", "--crops", "4"])
    assert "sae/a layer 0: l0 " in said and "explained variance" in said


def test_an_unknown_autoencoder_and_damaged_quality_are_named_in_one_line(run, data_folder):
    with pytest.raises(UserError, match=r"no sparse autoencoder 'c' \(found: a, b\)"):
        evaluate(EvaluateConfig(run.root, data_folder, sae=("c",), crops=4))
    (run.saes("a") / "quality.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"quality.json: not valid JSON"):
        evaluate(EvaluateConfig(run.root, data_folder, sae=("a",), crops=4))
