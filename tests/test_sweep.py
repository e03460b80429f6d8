"""Sweeps: one edit a row, controls of the same norm, what is measured of them, and success at a fixed KL."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

import processes
from cratescope import cli
from cratescope.errors import UserError
from cratescope.models import CrateConfig
from cratescope.models.presets import build
from cratescope.models.sae import CoderConfig, Origin, SparseCoder, save_coder
from cratescope.neurons.coded import CodedSite
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig, SteerConfig, SweepConfig
from cratescope.neurons.curves import CONTROLS, KINDS, OWN, UNEDITED, curves
from cratescope.neurons.directions import direct_logits, output_directions
from cratescope.neurons.outcomes import Aimed, FixedText, Writing, distinct
from cratescope.neurons.pushed import Pushes, Tail, module_of, pushed
from cratescope.neurons.sites import Site, site_named
from cratescope.neurons.steer import Edit, steered
from cratescope.neurons.sweep import Sweep, Units, example_unit, sweep
from cratescope.report.steering import steer
from cratescope.results.estimates import of_model
from cratescope.results.runs import load_results
from cratescope.results.steering import AIMS, at_kl, curve_rows, read_steering, read_swept, success_rows, summary
from cratescope.run import Run
from fake_run import fake_run

SHAPE: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 48}
LLAMA: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
MADE: dict[str, Any] = {
    "crate": CrateConfig(**SHAPE),
    "gpt2": GPT2Config(**SHAPE, bos_token_id=None, eos_token_id=None),
    "llama": LlamaConfig(**LLAMA, vocab_size=40, bos_token_id=None, eos_token_id=None),
}
TEXTS = torch.arange(3, 33).view(3, 10)
INDEX, VALUE = torch.tensor([2, 7, 7, 11]), torch.tensor([3.0, -2.0, 5.0, 0.0])


@pytest.fixture(scope="module")
def models():
    found = {kind: build(config, 0).eval() for kind, config in MADE.items()}
    for model in found.values():  # larger than they begin, so that edits are seen
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4)
    return found


def coded(model, kind, replace=False, layer=1):
    """Features of an untrained autoencoder of the model's neurons."""
    site = site_named("auto", model)
    width = output_directions(model, site, layer).shape[0]
    coder = SparseCoder(CoderConfig(kind, width, 30, k=6), Origin(), seed=3)
    with torch.no_grad():
        coder.bias.normal_(0, 0.01)
        coder.threshold.fill_(0.05)
    return CodedSite("sae/a", site.pattern, {layer: coder}, {}, replace)


def sites(model):
    yield site_named("auto", model)
    for kind in ("topk", "jumprelu"):
        for replace in (False, True):
            yield coded(model, kind, replace)


def own_pushes(model, site, operation="set", layer=1):
    """Each row forces one unit along its own direction."""
    written = output_directions(model, site, layer)[INDEX]
    m = output_directions(model, module_of(site), layer).shape[0]
    along = site.coders[layer].decoder[INDEX].detach() if isinstance(site, CodedSite) else torch.eye(m)[INDEX]
    return Pushes(site, layer, INDEX, VALUE, along, written, operation)


@torch.no_grad()
def logits(model, tokens, edits=()):
    with steered(model, edits):
        return model(tokens).logits


@pytest.mark.parametrize("operation", ["set", "add"])
@pytest.mark.parametrize("kind", MADE)
def test_a_row_of_its_own_direction_is_what_steered_does(models, kind, operation):
    model = models[kind]
    for site in sites(model):
        pushes = own_pushes(model, site, operation)
        tokens = TEXTS[:1].repeat(len(INDEX), 1)
        with torch.no_grad(), pushed(model, pushes):
            found = model(tokens).logits
        for row, (index, value) in enumerate(zip(INDEX.tolist(), VALUE.tolist(), strict=True)):
            alone = logits(model, TEXTS[:1], [Edit(site, 1, index, operation, value)])[0]
            torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[0], found[2], atol=1e-3)


@pytest.mark.parametrize("kind", MADE)
def test_passes_from_behind_a_block_give_what_whole_ones_give(models, kind):
    model = models[kind]
    for site in sites(model):
        pushes = own_pushes(model, site)
        tail = Tail(model, site, 1, TEXTS, 4, pushes.only(slice(0, 2)))
        assert tail._short
        found = tail.logits(pushes)
        assert found.shape == (4, 3, 4, 40)
        with torch.no_grad(), pushed(model, pushes.repeated(3)):
            whole = model(TEXTS.repeat(4, 1)).logits[:, -4:]
        torch.testing.assert_close(found.flatten(0, 1), whole, rtol=1e-4, atol=1e-4)
    after = logits(model, TEXTS)  # the blocks do what they did
    assert after.isfinite().all() and not torch.equal(after[:, -4:], found[0])


def test_where_what_is_written_is_read_within_the_block_passes_are_whole(models):
    """What attention adds goes through the MLP of the same block, too."""
    model = models["gpt2"]
    site = site_named("attention", model)
    axes = torch.eye(16)[INDEX]
    pushes = Pushes(site, 1, INDEX, VALUE, axes, axes)
    tail = Tail(model, site, 1, TEXTS, 4, pushes)
    assert not tail._short
    expected = logits(model, TEXTS, [Edit(site, 1, 7, "set", 5.0)])[:, -4:]
    torch.testing.assert_close(tail.logits(pushes)[2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MADE)
def test_rows_without_a_direction_leave_every_bit(models, kind):
    model = models[kind]
    site = site_named("auto", model)
    pushes = own_pushes(model, site)
    none = dataclasses.replace(pushes, along=torch.zeros_like(pushes.along), written=torch.zeros_like(pushes.written))
    tokens = TEXTS[:1].repeat(len(INDEX), 1)
    with torch.no_grad(), pushed(model, none):
        assert torch.equal(model(tokens).logits, logits(model, tokens))


def units_of(model, site, layer=1):
    own, module = (output_directions(model, one, layer) for one in (site, module_of(site)))
    order = [5, 2, 9]
    return Units(site, layer, own, module, dict.fromkeys(order, 1.0), order)


@pytest.mark.parametrize("kind", MADE)
def test_controls_write_the_same_norm_elsewhere(models, kind):
    for site in sites(models[kind]):
        units = units_of(models[kind], site)
        for index, other in ((5, 2), (9, 5)):
            found = {name: along @ units.module for name, along in units.directions(index, seed=0).items()}
            assert set(found) == {*KINDS}
            own = found[OWN]
            torch.testing.assert_close(own, units.own[index], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["flipped"], -own)
            for control in CONTROLS:
                torch.testing.assert_close(found[control].norm(), own.norm(), rtol=1e-4, atol=1e-5)
            cosine = torch.nn.functional.cosine_similarity
            assert cosine(found["other"], units.own[other], dim=0) > 0.999
            assert abs(cosine(found["random"], own, dim=0)) < 0.9


def test_random_directions_are_isotropic_and_of_their_own_seed(models):
    units = units_of(models["gpt2"], site_named("auto", models["gpt2"]))
    found = torch.stack([units.random(index, 0) @ units.module for index in range(400)])
    spread = torch.linalg.svdvals(found) / 20  # of a standard normal matrix: within 1 +- sqrt(16 / 400)
    assert spread.min() > 0.7 and spread.max() < 1.3
    assert torch.equal(units.random(5, 0), units.random(5, 0))
    assert not torch.equal(units.random(5, 0), units.random(5, 1))


@torch.no_grad()
def planted():
    """A GPT-2 whose neuron 5 of the last layer writes the direction of token 17 alone."""
    model = build(MADE["gpt2"], 1).eval()
    model.lm_head.weight.mul_(30)
    block = model.transformer.h[2].mlp
    row = model.lm_head.weight[17] - model.lm_head.weight.mean(0)
    block.c_proj.weight[5] = row / row.norm()
    return model


def measured(model, kind, strength):
    site = site_named("auto", model)
    units = units_of(model, site, layer=2)
    found = units.directions(5, seed=0)
    along = found[kind][None]
    top = direct_logits(model, torch.stack([found[OWN] @ units.module, found[kind] @ units.module])).topk(1).indices
    pushes = Pushes(site, 2, torch.tensor([5]), torch.tensor([strength]), along, along @ units.module)
    text = FixedText(model, torch.cat([TEXTS, TEXTS[:, :1]], 1))
    writing = Writing(model, [[1, 2], [3]], 12, seed=0)
    aimed = Aimed(pushes, top[:1], top[1:])
    numbers = text.measured(Tail(model, site, 2, text.tokens, text.last, pushes), aimed) | writing.measured(aimed)
    return SimpleNamespace(top=top, **{name: float(value) for name, value in numbers.items()})


def test_forcing_a_planted_neuron_raises_its_token_and_controls_do_not():
    model = planted()
    found = {kind: measured(model, kind, 30.0) for kind in KINDS}
    own = found[OWN]
    assert own.top.tolist() == [[17], [17]]
    assert own.mass > 0.8 and own.mass_plain < 0.2 and own.rate > 0.8 and own.rate_plain < 0.3
    assert own.logit > 1 and own.logprob > 1 and own.kl > 1 and own.loss > 1
    for control in CONTROLS:
        assert found[control].mass < 0.1 and found[control].rate < 0.3
        assert found[control].aim_mass > found[control].mass, "on the token that it is aimed at it does something"


def test_numbers_are_those_of_a_slow_loop():
    model, site = planted(), Site("mlp", "transformer.h.{layer}.mlp.act")
    found = measured(model, OWN, 3.0)
    text = torch.cat([TEXTS, TEXTS[:, :1]], 1)
    before = logits(model, text[:, :-1])[:, -3:].double().log_softmax(-1)
    after = logits(model, text[:, :-1], [Edit(site, 2, 5, "set", 3.0)])[:, -3:].double().log_softmax(-1)
    kls = [float((p.exp() * (p - q)).sum()) for p, q in zip(after.flatten(0, 1), before.flatten(0, 1), strict=True)]
    assert found.kl == pytest.approx(np.mean(kls), rel=1e-3)
    assert found.mass == pytest.approx(float(after[..., 17].exp().mean()), rel=1e-4)
    assert found.mass_plain == pytest.approx(float(before[..., 17].exp().mean()), rel=1e-4)
    assert found.logprob == pytest.approx(float((after - before)[..., 17].mean()), rel=1e-3)
    losses = [-each.gather(-1, text[:, -3:, None]).mean() for each in (before, after)]
    assert found.loss == pytest.approx(float(losses[1] - losses[0]), rel=1e-3)


def test_stronger_edits_move_predictions_farther():
    model = planted()
    found = [measured(model, OWN, strength) for strength in (0.5, 2.0, 8.0, 32.0)]
    for name in ("kl", "mass", "logprob"):
        values = [getattr(one, name) for one in found]
        assert values == sorted(values) and values[0] < values[-1]


def test_written_text_without_an_edit_is_the_plain_one_with_and_without_a_cache():
    model, site = planted(), Site("mlp", "transformer.h.{layer}.mlp.act")
    writing = Writing(model, [[1, 2], [3]], 12, seed=0)
    zero = torch.zeros(2, 64), torch.zeros(2, 16)
    aimed = Aimed(
        Pushes(site, 1, torch.tensor([1, 2]), torch.ones(2), *zero), torch.tensor([[4], [5]]), torch.tensor([[4], [5]])
    )
    found = writing.measured(aimed)
    for name in ("rate", "nats", "distinct"):
        torch.testing.assert_close(found[name], found[f"{name}_plain"].expand(2))

    class WithoutCache(torch.nn.Module):
        config, device = model.config, model.device

        def forward(self, tokens, use_cache=True):
            return SimpleNamespace(logits=model(tokens).logits)

    again = Writing(WithoutCache(), [[1, 2], [3]], 12, seed=0)
    assert [text.tolist() for text, _ in again.plain] == [text.tolist() for text, _ in writing.plain]
    assert Writing(model, [[1, 2], [3]], 12, seed=1).plain[0][0].tolist() != writing.plain[0][0].tolist()


def test_repetition_is_counted_in_pairs():
    found = distinct(torch.tensor([[1, 2, 1, 2, 1], [1, 1, 1, 1, 1], [1, 2, 3, 4, 5]]))
    assert found.tolist() == [0.5, 0.25, 1.0]
    assert distinct(torch.tensor([[1]])).tolist() == [1.0]


@pytest.mark.parametrize(
    ("curve", "wanted", "start", "found"),
    [
        ([(0.25, 2.0), (1.0, 6.0)], 0.25, None, 2.0),
        ([(0.25, 2.0), (1.0, 6.0)], 0.0625, None, 1.0),  # half way in the square root, from no edit on
        ([(0.25, 2.0), (1.0, 6.0)], 0.5625, None, 4.0),
        ([(0.25, 2.0), (1.0, 6.0)], 3.0, None, 6.0),  # never so far: the strongest
        ([(0.25, 2.0), (0.1, 9.0), (1.0, 6.0)], 0.2, None, 2.0 * 0.8**0.5),  # where it is first
        ([(0.3, 2.0)], 0.3, (0.4, 1.0), 0.0),  # no edit costs more: not to steer
        ([(1.0, 3.0)], 0.5625, (0.25, 1.0), 2.0),
        ([(0.0, 0.0), (0.0, 5.0)], 0.1, None, 5.0),
        ([], 0.1, None, 0.0),
    ],
)
def test_success_is_read_off_where_the_curve_first_is_so_far(curve, wanted, start, found):
    assert at_kl(curve, wanted, 0.0, start) == pytest.approx(found)


HOW: dict[str, Any] = {"strengths": (1.0, 8.0), "units": 3, "texts": 4, "context": 12, "length": 4}
HOW |= {"prefixes": ("the cat", "a judge")}


def config_of(run, site="auto", sae="delta", how=(), **options):
    return SteerConfig(
        run.root, sweep=True, site=site, sae=sae, device="cpu", how=SweepConfig(**HOW | dict(how)), **options
    )


@pytest.fixture(scope="module", params=["crate", "gpt2"])
def run(runs_folder, data_folder, tmp_path_factory, request):
    """A trained run with records of its neurons and of the features of an untrained autoencoder."""
    root = tmp_path_factory.mktemp("swept") / request.param
    shutil.copytree(runs_folder / request.param, root, ignore=shutil.ignore_patterns("records", "saes", "steering"))
    found = Run(root)
    pattern = {"crate": "transformer.h.{layer}.ista.codes", "gpt2": "transformer.h.{layer}.mlp.act"}[request.param]
    origin = Origin(model_sha256=found.fingerprint(), pattern=pattern)
    save_coder(found.saes("small") / "layer-00", SparseCoder(CoderConfig("batchtopk", 512, 96, k=7), origin))
    for site in ("auto", "sae/small"):
        collect(
            CollectConfig(root, data=data_folder, site=site, excerpts=40, context=24, window=8, part=16, device="cpu")
        )
    return found


@pytest.fixture(scope="module")
def swept(run):
    return {
        (site, sae): sweep(config_of(run, site, sae))
        for site, sae in (("auto", "delta"), ("sae/small", "delta"), ("sae/small", "replace"))
    }


def test_a_sweep_keeps_every_strength_of_every_kind(run, swept):
    native = "codes" if run.name == "crate" else "mlp"
    assert [folder.name for folder in swept.values()] == [native, "sae-small", "sae-small-replace"]
    for (_, sae), folder in swept.items():
        table = pd.read_parquet(folder / "layer-00.parquet")
        assert table["index"].nunique() == 3 and not (folder / ".parts").exists()
        for _, unit in table.groupby("index"):
            assert {*unit[unit.kind != UNEDITED].groupby("kind").size()} == {2} and {*KINDS} <= {*unit.kind}
            assert (unit.kind == UNEDITED).sum() == (sae == "replace")
            assert np.ptp(unit.norm[unit.kind != UNEDITED]) < 1e-5
        numbers = table.select_dtypes("number")
        assert np.isfinite(numbers.to_numpy()).all() and (table.kl >= -1e-6).all()
        assert table.mass.between(0, 1).all() and table.rate.between(0, 1).all()


def test_only_active_units_are_drawn_in_the_order_of_the_seed(run, swept):
    work = Sweep.of(config_of(run))
    units = work.units(0)
    table = pd.read_parquet(run.records(work.site.name) / "layer-00.parquet")
    assert set(units.maxima) == set(table["index"][table.maximum > 0])
    found = pd.read_parquet(swept["auto", "delta"] / "layer-00.parquet")
    assert sorted({*found["index"]}) == sorted(units.drawn(3))
    value = found[(found.kind == OWN) & (found.strength == 8)].set_index("index").value
    for index in units.drawn(3):
        assert value[index] == pytest.approx(8 * units.maxima[index])


def test_a_second_sweep_does_nothing_again_and_a_larger_one_adds(run, swept, monkeypatch):
    folder = swept["auto", "delta"]
    before = (folder / "layer-00.parquet").read_bytes()
    monkeypatch.setattr(Sweep, "measured", lambda *_: pytest.fail("measured again"))
    assert sweep(config_of(run)) == folder
    monkeypatch.undo()
    assert (folder / "layer-00.parquet").read_bytes() == before
    copy = Run(shutil.copytree(run.root, run.root.parent / f"{run.name}-more"))
    shutil.copytree(folder, copy.steering(folder.name), dirs_exist_ok=True)
    more = curves(sweep(config_of(copy, how={"units": 4}))).read(0)
    kept = curves(folder).read(0)
    assert len(more) == 4 and all(more[index] == points for index, points in kept.items())
    with pytest.raises(UserError, match=r"was made with texts = 4, not 5; delete that folder"):
        sweep(config_of(run, how={"texts": 5}))


def test_a_sweep_killed_at_any_change_of_the_disk_ends_with_the_same_files(
    run, swept, data_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("cratescope.parts.ROWS", 1)
    for change in (1, 3, 5):
        root = shutil.copytree(run.root, tmp_path / str(change) / run.name, ignore=shutil.ignore_patterns("steering"))
        config = config_of(Run(root), how={"data": data_folder})
        processes.killed_before(change, functools.partial(sweep, config))
        folder = sweep(config)
        for name in ("layer-00.parquet", "example.json"):
            assert (folder / name).read_bytes() == (swept["auto", "delta"] / name).read_bytes()


def test_the_example_forces_the_unit_that_raises_the_prompts_tokens_most(run, swept):
    work = Sweep.of(config_of(run))
    layer, index = example_unit(work, "1 2 3 4 5")
    [ids] = run.tokenizer(["1 2 3 4 5"]).input_ids
    directions = output_directions(work.model, work.site, 0)
    best = max(work.units(0).maxima, key=lambda unit: standard(work.model, directions[unit], ids))
    assert (layer, index) == (0, best)
    for (_, sae), folder in swept.items():
        found = json.loads((folder / "example.json").read_text())
        assert found["prompt"] == "1 2 3 4 5" and len(found["rises"]) == len(found["likelier"]) == 10
        assert re.fullmatch(r"(sae/small/)?0:\d+=4x", found["edits"][0]), sae
        gained = [token["steered"] - token["plain"] for token in found["likelier"]]
        assert gained == sorted(gained, reverse=True)


def standard(model, direction, ids):
    found = direct_logits(model, direction[None])[0]
    return float(((found - found.mean()) / found.std())[sorted(set(ids))].mean())


def test_what_is_read_of_a_sweep(run, swept):
    found = read_steering(run)
    assert [(one.site, one.mode) for one in found][1:] == [("sae/small", "delta"), ("sae/small", "replace")]
    for one in found:
        points = one.points[0]
        assert len(points) == 3 and one.example
        for index, kinds in points.items():
            last = kinds[OWN][-1]
            if max(point.kl for point in kinds[OWN]) < 1e9:
                assert one.success(1e9)[0][index] == pytest.approx(last.mass - last.mass_plain)
            aims = kinds["random"][-1]
            assert one.success(1e9, "rate", "random", AIMS)[0][index] == pytest.approx(
                aims.aim_rate - aims.aim_rate_plain
            )
            expected = one.success(0.5)[0][index] - one.success(0.5, kind="random", tokens=AIMS)[0][index]
            assert one.gain()[0][index] == pytest.approx(expected)
        assert of_model(one.gain()).n == 3
    replaced = found[2]
    floor = min(kinds[UNEDITED][0].kl for kinds in replaced.points[0].values())
    assert floor > 0 and {*replaced.success(floor / 2)[0].values()} == {0.0}


def test_curves_of_another_model_are_refused(run, swept, tmp_path):
    copy = Run(shutil.copytree(run.root, tmp_path / run.name))
    path = swept["auto", "delta"].relative_to(run.root)
    about = json.loads((copy.root / path / "manifest.json").read_text())
    about["identity"]["model_sha256"] = "0" * 64
    (copy.root / path / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="curves of another model; delete it"):
        read_steering(copy)


def test_rows_have_every_success_and_gain_with_its_interval(run, swept, tmp_path):
    [item] = load_results([fake_run(tmp_path / "fake").root])
    pairs = read_swept([dataclasses.replace(item, run=run)])
    rows = success_rows(pairs)
    assert len(rows) == 3 * 3 * 3 * 5 * 2  # sweeps, KLs, measures, success and four gains, a layer and the mean
    assert all(row["low"] <= row["mean"] <= row["high"] for row in rows)
    means = curve_rows(pairs)
    assert len(means) == 3 * 8 + 1 and {row["n"] for row in means} == {3}
    assert [row["untrained"].mean for row in summary(pairs)] == [None] * 3


def test_one_unit_gets_a_table_a_file_and_a_figure(run, swept):
    work = Sweep.of(config_of(run))
    index = work.units(0).order[0]
    options = ["--texts", "4", "--context", "12", "--length", "4", "--strengths", "1", "8", "--device", "cpu"]
    options += ["--prefixes", "the cat", "a judge"]
    shown = cli.run(["steer", str(run.root), "--sweep", "--neuron", f"0:{index}", *options])
    assert "targets: " in shown and "without edit: mass" in shown
    assert [line.split()[0] for line in shown.splitlines() if re.match(r" ?(own|random|flipped|other) ", line)]
    table = swept["auto", "delta"] / f"layer-00-unit-{index}.csv"
    assert str(table) in shown and table.with_suffix(".svg").read_text().startswith("<?xml")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    kept = {(one.kind, one.strength): one for one in curves(swept["auto", "delta"]).read(0)[index]}
    assert len(rows) == 8
    for row in rows:  # the same as in the sample, of which it is one; it was not added to it
        assert float(row["kl"]) == pytest.approx(kept[row["kind"], float(row["strength"])].kl, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "how", "message"),
    [
        ({"edit": ("0:3=1",)}, {}, "--edit: a sweep makes edits and files of its own"),
        ({"neuron": "3"}, {}, "--neuron '3': a sweep takes LAYER:NEURON such as 1:37"),
        ({"neuron": "0:9999"}, {}, "0:9999: no record of such a unit that was ever active"),
        ({"neuron": "7:1"}, {}, "--layers 7: no such layer"),
        ({}, {"layers": (7,)}, "--layers 7: no such layer"),
        ({}, {"prefixes": ("the cat", "")}, "--prefixes: is empty; give a value or leave it out"),
        ({"prompt": "the cat " * 20}, {}, "--prompt of 82 tokens is more than a model of 32 can write on from"),
        ({}, {"length": 40}, "--length 40 are more than the 32 tokens of this model; give fewer"),
        ({}, {"context": 33}, "context = 33 is longer than the 32 tokens of this model"),
        ({}, {"texts": 100_000}, "ask for fewer or shorter ones, or prepare more text"),
        ({"site": "attention"}, {}, "no records, which a unit is measured by; run `cratescope collect"),
        ({"site": "sae/none"}, {}, "no sparse autoencoder 'none'"),
    ],
)
def test_what_a_sweep_cannot_do_is_one_line(run, options, how, message):
    with pytest.raises(UserError, match=re.escape(message)) as said:
        steer(config_of(run, how=how, **options))
    assert len(str(said.value).splitlines()) == 1


def test_a_strength_that_makes_logits_infinite_is_refused(run, tmp_path):
    copy = Run(shutil.copytree(run.root, tmp_path / run.name, ignore=shutil.ignore_patterns("steering")))
    records = copy.records("codes" if run.name == "crate" else "mlp")
    assert records.is_dir()
    with pytest.raises(UserError, match="has to be") as said:
        config_of(copy, how={"strengths": (float("inf"),)})
    assert "strengths" in str(said.value)
    with pytest.raises(UserError, match="--strengths 1: named twice"):
        config_of(copy, how={"strengths": (1.0, 2.0, 1.0)})


def test_a_neuron_and_its_value_are_short_for_an_edit(run):
    long, short = (
        steer(SteerConfig(run.root, prompt="the cat", tokens=4, device="cpu", **given))
        for given in ({"edit": ("0:3=40",)}, {"neuron": "0:3", "set": "40"})
    )
    assert long == short
