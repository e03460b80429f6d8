"""What neurons do to predictions: against slow loops over single passes, on planted neurons, resumed, and refused."""

from __future__ import annotations

import shutil

import numpy as np
import pandas
import pytest
import scipy.stats
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cratescope import cli
from cratescope.errors import UserError
from cratescope.models.sae import save_coder
from cratescope.neurons import affect
from cratescope.neurons.affect import average_ranks, effects, output_score, spearman
from cratescope.neurons.coded import find_coders
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig, EffectsConfig
from cratescope.neurons.directions import direct_logits, output_directions
from cratescope.neurons.effects import kept_effects
from cratescope.neurons.forced import Forced
from cratescope.neurons.records import layer_file, read_records
from cratescope.neurons.sites import hooked, read_site, site_named
from cratescope.neurons.steer import Edit, steered
from cratescope.run import Run
from cratescope.text.shards import TokenData
from cratescope.text.tokenizer import encode, load_tokenizer
from test_coded import random_coder
from test_collect import SMALL
from tiny_models import tiny_config, tiny_model

FEW = {"contexts": 3, "context": 8, "neurons": 6, "batch_size": 4, "device": "cpu"}
EVERY = {"neurons": None, "batch_size": 64}
TEXT = [5, 9, 200, 7, 31, 4]


@pytest.fixture(scope="module")
def collected(runs_folder, tmp_path_factory):
    """The runs with records of their neurons."""
    folder = tmp_path_factory.mktemp("collected")
    for name in ("crate", "gpt2"):
        shutil.copytree(runs_folder / name, folder / name, ignore=shutil.ignore_patterns("records", "saes", "effects"))
        collect(CollectConfig(folder / name, **SMALL))
    return folder


@pytest.fixture(params=["crate", "gpt2"])
def run(collected, tmp_path, request):
    shutil.copytree(collected / request.param, tmp_path / request.param)
    return Run(tmp_path / request.param)


def adopted(model, tmp_path, data_folder, **options):
    """A run of a model that was saved, with records."""
    model.save_pretrained(tmp_path / "source")
    TokenData.open(data_folder).tokenizer.save_pretrained(tmp_path / "source")
    given = SMALL | {"data": data_folder, "model": str(tmp_path / "source")} | options
    collect(CollectConfig(tmp_path / "run", **given))
    return Run(tmp_path / "run")


def found(run, site="auto", layer=0, **options):
    folder = effects(EffectsConfig(run.root, site=site, **FEW | options))
    return kept_effects(folder).read(layer)


def slowly(run, site, record, texts, n_ids):
    """Mean change of logits (V,) less their mean, of probabilities, and KL, by one steered pass a text."""
    model = run.load_model().eval().double()
    last = len(texts[0]) - 1
    moved, chances, kl = [], [], []
    for text in texts:
        tokens = torch.tensor([text])
        edit = Edit(site, record.neuron.layer, record.neuron.index, "set", record.moments.maximum, where=(last,))
        with torch.no_grad():
            before = model(tokens).logits[0, -1]
            with steered(model, [edit]):
                after = model(tokens).logits[0, -1]
        change = after - before
        moved.append(change - change.mean())
        chances.append(after.softmax(-1) - before.softmax(-1))
        kl.append((after.softmax(-1) * (after.log_softmax(-1) - before.log_softmax(-1))).sum())
    return torch.stack(moved).mean(0)[:n_ids], torch.stack(chances).mean(0), torch.stack(kl).mean()


@pytest.mark.parametrize("coded", [False, True])
def test_effects_are_those_of_a_slow_loop_over_texts_and_neurons(run, data_folder, coded):
    if coded:
        save_coder(run.saes("small") / "layer-00", random_coder(run, run.name))
        collect(CollectConfig(run.root, site="sae/small", **SMALL))
    name = "sae/small" if coded else "auto"
    model = run.load_model().eval()
    site = find_coders(run, "small") if coded else site_named("auto", model)
    texts = TokenData.open(data_folder).split("heldout").spaced(FEW["contexts"], FEW["context"]).tolist()
    direct = direct_logits(model, output_directions(model, site, 0))
    n_ids = len(run.tokenizer)
    several = found(run, name)
    assert len(several) == FEW["neurons"]
    records = read_records(layer_file(run.records(site.name), 0), [*several])
    for index, one in several.items():
        if one.unmeasured:
            assert records[index].dead and not one.measured_raises and one.kl is one.direct_share is None
            continue
        moved, chances, kl = slowly(run, site, records[index], texts, n_ids)
        ordered = moved.sort(descending=True).values
        assert [token.change for token in one.measured_raises] == pytest.approx(ordered[:20].tolist(), abs=2e-5)
        assert [token.change for token in one.measured_lowers] == pytest.approx(ordered.flip(0)[:20].tolist(), abs=2e-5)
        for token in (*one.measured_raises, *one.measured_lowers):
            assert token.change == pytest.approx(float(moved[token.token]), abs=2e-5)
            assert token.probability == pytest.approx(float(chances[token.token]), abs=1e-6)
        assert one.kl == pytest.approx(float(kl), abs=1e-6)
        row = (direct[index] - direct[index].mean())[:n_ids]
        assert [token.logit for token in one.raises] == pytest.approx(row.sort(descending=True).values[:20].tolist())
        assert one.direct_share == pytest.approx(scipy.stats.spearmanr(row, moved).statistic, abs=1e-3)
        peaks = [int(window.tokens[window.peak]) for window in records[index].top]
        listed = {token.token for token in one.raises}
        assert one.input_score == pytest.approx(np.mean([peak in listed for peak in peaks]))


def test_the_output_score_adds_ten_times_the_largest_activation_after_the_neutral_prompt(run):
    model, site = run.load_model().eval(), site_named("auto", run.load_model())
    [ids] = encode(run.tokenizer, ["From my experience,"])
    with torch.no_grad(), read_site(model, site, [0]) as seen:
        plain = model(torch.tensor([ids])).logits[0, -1]
    add = 10 * float(seen[0][0, -1].max())
    for index, one in found(run).items():
        edit = Edit(site, 0, index, "add", add, where=(len(ids) - 1,))
        with torch.no_grad(), steered(model, [edit]):
            after = model(torch.tensor([ids])).logits[0, -1]
        for logits, score in ((after, one.output_score), (plain, one.output_score_plain)):
            ranks = logits.argsort(descending=True).argsort()
            listed = [token.token for token in one.raises]
            expected = (1 - ranks[listed].min() / len(logits)) * logits.softmax(-1)[listed].max()
            assert score == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    "kind, cached",
    [("gpt2", True), ("llama", True), ("gpt_neox", True), ("gemma2", True), ("mixtral", True), ("bloom", True)]
    + [("mamba", False), ("openai-gpt", False)],
)
def test_any_model_is_forced_as_by_single_passes_with_a_cache_or_without(kind, cached):
    model = tiny_model(kind)
    site = site_named("residual" if kind == "mixtral" else "auto", model)
    forced = Forced(model, site, 0)
    read = forced.read(TEXT)
    index, value = torch.tensor([3, 0, 9, 3]), torch.tensor([2.0, -1.0, 5.0, 0.5])
    together = forced.logits(read, index, value)
    assert forced.cached == cached
    for row, (neuron, number) in enumerate(zip(index.tolist(), value.tolist(), strict=True)):
        edit = Edit(site, 0, neuron, "set", number, where=(len(TEXT) - 1,))
        with torch.no_grad(), steered(model, [edit]):
            alone = model(torch.tensor([TEXT])).logits[0, -1]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(read.logits, model(torch.tensor([TEXT])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_a_cache_that_forgets_is_not_used():
    """Its model gives other logits with it than without."""
    model = tiny_model("gpt2")
    forward = model.forward
    model.forward = lambda ids, past_key_values=None, use_cache=True, **others: forward(ids, use_cache=use_cache)
    forced = Forced(model, site_named("auto", model), 1)
    read = forced.read(TEXT)
    assert forced.cached is False and read.cache is None


PLANTED, KNOWN, SILENT = 17, 77, 18


def planted_gpt2():
    """One neuron of the last layer writes a token's embedding, and one never fires."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    mlp = model.transformer.h[1].mlp
    with torch.no_grad():
        mlp.c_proj.weight[PLANTED] = 100 * model.transformer.wte.weight[KNOWN]
        mlp.c_fc.weight[:, SILENT] = 0
        mlp.c_fc.bias[SILENT] = -1e4
    return model


def test_a_planted_neuron_raises_the_token_that_it_writes(tmp_path, data_folder):
    run = adopted(planted_gpt2(), tmp_path, data_folder)
    several = found(run, layer=1, **EVERY, strength=3)
    one = several[PLANTED]
    assert one.raises[0].token == one.measured_raises[0].token == KNOWN
    assert one.measured_raises[0].change > 0.5 and one.measured_raises[0].probability > 0
    assert one.direct_share > 0.9 and one.kl > np.median([each.kl for each in several.values() if each.kl])
    assert one.output_score > one.output_score_plain
    assert one.raises[0].text == load_tokenizer(run.model).decode([KNOWN])
    assert one.value == pytest.approx(3 * read_records(layer_file(run.records("mlp"), 1))[PLANTED].moments.maximum)


def test_a_dead_neuron_has_tokens_by_its_weights_and_a_reason(tmp_path, data_folder):
    run = adopted(planted_gpt2(), tmp_path, data_folder)
    one = found(run, layer=1, **EVERY)[SILENT]
    record = read_records(layer_file(run.records("mlp"), 1))[SILENT]
    assert record.dead == (one.unmeasured == "dead neuron") == True  # noqa: E712 (each of the three)
    assert len(one.raises) == 20 and one.output_score is not None
    assert one.value is one.kl is one.direct_share is one.input_score is None and not one.measured_raises


def test_without_directions_what_is_measured_is_there_with_the_reason(tmp_path, data_folder):
    torch.manual_seed(0)
    run = adopted(tiny_model("gemma2"), tmp_path, data_folder)
    for one in found(run, layer=1).values():
        assert "not added to the residual stream by one matrix" in one.undirected
        assert not one.raises and one.direct_share is one.output_score is one.input_score is None
        assert one.unmeasured or len(one.measured_raises) == 20 and one.kl > 0


def test_a_model_in_bfloat16_gives_nearly_the_same(tmp_path, data_folder):
    model = planted_gpt2()
    whole = found(adopted(model, tmp_path / "whole", data_folder), layer=1, **EVERY, strength=3)[PLANTED]
    narrow = found(adopted(model.to(torch.bfloat16), tmp_path / "narrow", data_folder), layer=1, **EVERY, strength=3)[
        PLANTED
    ]
    assert narrow.measured_raises[0].token == KNOWN
    assert narrow.measured_raises[0].change == pytest.approx(whole.measured_raises[0].change, rel=0.1)
    assert narrow.kl == pytest.approx(whole.kl, rel=0.3)


@pytest.mark.parametrize("name", ["attention", "residual"])
def test_axes_of_the_stream_have_effects_too(run, name):
    collect(CollectConfig(run.root, site=name, **SMALL))
    for one in found(run, name).values():
        assert len(one.raises) == 20 and (one.unmeasured or one.direct_share is not None)


def test_an_interrupted_stage_resumes_to_the_same_bytes_and_a_larger_sample_keeps_what_is_done(run, monkeypatch):
    config = EffectsConfig(run.root, **FEW | {"neurons": 12})
    whole = layer_file(effects(config), 0).read_bytes()
    shutil.rmtree(run.effects("codes" if run.name == "crate" else "mlp").parent)
    measured, of = [], affect._Measured.of

    def noting(self, records):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append([record.neuron.index for record in records])
        return of(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(affect._Measured, "of", noting)
        with pytest.raises(KeyboardInterrupt):
            effects(config)
    before = [*measured]
    measured.clear()
    monkeypatch.setattr(affect._Measured, "of", noting)
    assert layer_file(effects(config), 0).read_bytes() == whole
    assert len(measured) == 1 and measured[0] not in before
    assert layer_file(effects(config), 0).read_bytes() == whole and len(measured) == 1


def test_workers_share_the_neurons(run):
    config = EffectsConfig(run.root, **FEW | {"neurons": 12})
    whole = layer_file(effects(config), 0).read_bytes()
    shutil.rmtree(run.root / "effects")
    for worker in ("1/2", "0/2"):
        folder = effects(EffectsConfig(run.root, worker=worker, **FEW | {"neurons": 12}))
    assert layer_file(folder, 0).read_bytes() == whole


def test_other_settings_are_refused_by_a_folder_that_has_effects(run):
    found(run)
    for other in ({"strength": 2}, {"contexts": 4}, {"prompt": "So"}):
        with pytest.raises(UserError, match=f"was made with {next(iter(other))}"):
            found(run, **other)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"neurons": 10_000}, "512 neurons in the records"),
        ({"layers": (7,)}, "no such layer"),
        ({"site": "nothing"}, "run `cratescope collect` first"),
        ({"context": 4000}, "longer than the 32 tokens"),
        ({"contexts": 10**6}, "ask for fewer"),
        ({"prompt": "\u200d" * 900}, "longer than the 32 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(run, options, message):
    with pytest.raises(UserError, match=message) as refused:
        found(run, **options)
    assert "\n" not in str(refused.value)


def test_records_of_another_model_are_refused(run, runs_folder):
    other = "gpt2" if run.name == "crate" else "crate"
    shutil.rmtree(run.model)
    shutil.copytree(runs_folder / other / "model", run.model)
    with pytest.raises(UserError, match="records of another model"):
        found(run)


def test_a_number_beyond_the_format_is_refused_with_the_fix(tmp_path, data_folder):
    model = planted_gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[PLANTED] *= 100
    run = adopted(model.to(torch.float16), tmp_path, data_folder)
    with pytest.raises(UserError, match=r"give a smaller --strength, or --dtype float32"):
        found(run, layer=1, **EVERY, strength=10_000.0)


def test_the_command_says_where_the_tables_are_and_pandas_reads_them(run):
    said = cli.run(["effects", str(run.root), "--contexts=2", "--context=8", "--neurons=3"])
    table = pandas.read_parquet(f"{said}/layer-00.parquet")
    assert len(table) == 3 and {"raises", "measured_raises", "direct_share", "output_score"} <= {*table.columns}


def test_a_neuron_has_its_effects_and_its_card_shows_them(run):
    assert run.neuron(0, 3).effects is None and "effects" not in str(run.neuron(0, 3))
    index, one = next(iter(found(run).items()))
    neuron = run.neuron(0, index)
    assert neuron.effects == one
    shown = str(neuron)
    assert "raises, by weights" in shown and (one.unmeasured or "measured") in shown and "output score" in shown


def test_ranks_of_equal_values_are_their_mean():
    values = torch.randint(0, 4, (5, 30), generator=torch.Generator().manual_seed(0)).float()
    expected = scipy.stats.rankdata(values.numpy(), axis=1) - 1
    assert np.allclose(average_ranks(values).numpy(), expected)
    other = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    known = 20
    rows = [scipy.stats.spearmanr(a[:known], b[:known]).statistic for a, b in zip(values, other, strict=True)]
    assert np.allclose(spearman(values, other, known).numpy(), rows)
    assert spearman(torch.ones(1, 9), other[:1, :9], 9).isnan().all()


def test_the_output_score_is_one_where_the_token_is_certain_and_small_where_it_is_last():
    logits = torch.zeros(2, 100)
    logits[0, 5], logits[1, 5] = 50, -50
    score = output_score(logits, torch.tensor([[5], [5]]))
    assert score[0] == pytest.approx(1) and score[1] < 1e-6


def test_hooks_are_gone_afterwards(run):
    model = run.load_model().eval()
    forced = Forced(model, site_named("auto", model), 0)
    read = forced.read(TEXT)
    forced.logits(read, torch.tensor([0]), torch.tensor([3.0]))
    seen = []
    with torch.no_grad(), hooked(model, site_named("auto", model), [0], lambda layer, x: seen.append(layer)):
        again = model(torch.tensor([TEXT])).logits[0, -1]
    torch.testing.assert_close(again, read.logits, atol=1e-4, rtol=1e-4)
    assert seen == [0] and tiny_config("gpt2").n_layer == 2
