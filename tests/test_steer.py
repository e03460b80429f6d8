"""Edits of neurons: what each does, at which tokens, in which units, and that a cache or padding changes nothing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, LlamaConfig

from cratescope import cli
from cratescope.errors import UserError
from cratescope.exchange.reference import from_reference, load_checkpoint
from cratescope.models import CrateConfig
from cratescope.models.presets import build
from cratescope.models.sae import CoderConfig, Origin, SparseCoder
from cratescope.neurons.coded import CodedSite
from cratescope.neurons.config import SteerConfig
from cratescope.neurons.continuations import steer
from cratescope.neurons.records import Histogram, Moments, NeuronId, NeuronRecord, layer_file, write_records
from cratescope.neurons.sites import Site, read_site, site_named
from cratescope.neurons.spelled import read_edit
from cratescope.neurons.steer import Above, Edit, in_raw_units, steered
from cratescope.run import Run, claim
from tiny_models import tiny_model

SHAPE: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 48}
LLAMA: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
MADE: dict[str, Any] = {
    "crate": CrateConfig(**SHAPE),
    "gpt2": GPT2Config(**SHAPE, bos_token_id=None, eos_token_id=None),
    "llama": LlamaConfig(**LLAMA, vocab_size=40, bos_token_id=None, eos_token_id=None),
}
TINY = ("mistral", "gpt_neox", "lfm2")  # a window of attention, another MLP, layers without attention
TOKENS = torch.arange(3, 27).view(2, 12)
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def models():
    return {kind: build(config, 0).eval() for kind, config in MADE.items()}


@pytest.fixture(scope="module")
def gpt2(models):
    return models["gpt2"], site_named("auto", models["gpt2"])


@torch.no_grad()
def logits(model, tokens=TOKENS, edits=(), prompt=None, **given):
    with steered(model, edits, prompt):
        return model(tokens, **given).logits


@torch.no_grad()
def by_hand(model, site, layer, change, tokens=TOKENS):
    """Logits where `change` was applied in place to a copy of the module's activations, by a hook written here."""
    module = model.get_submodule(site.path(layer))

    def hook(_module, _inputs, output):
        output = output.clone()
        change(output)
        return output

    handle = module.register_forward_hook(hook)
    try:
        return model(tokens).logits
    finally:
        handle.remove()


def put(x, index, value):
    x[..., index] = value


OPERATIONS = {
    "set": ({"value": 2.5}, lambda x: put(x, 7, 2.5)),
    "add": ({"value": -1.5}, lambda x: put(x, 7, x[..., 7] - 1.5)),
    "scale": ({"value": 40.0}, lambda x: put(x, 7, x[..., 7] * 40)),
    "ablate": ({}, lambda x: put(x, 7, 0)),
    "cap": ({"low": 0.01, "high": 0.02}, lambda x: put(x, 7, x[..., 7].clamp(0.01, 0.02))),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", ["crate", "gpt2"])
def test_each_operation_is_what_a_hook_by_hand_does(models, kind, operation):
    model, site = models[kind], site_named("auto", models[kind])
    numbers, change = OPERATIONS[operation]
    found = logits(model, edits=[Edit(site, 1, 7, operation, **numbers)])
    assert torch.equal(found, by_hand(model, site, 1, change))
    assert not torch.equal(found, logits(model))


def test_a_cap_may_have_one_end(gpt2):
    model, site = gpt2
    for ends in ({"low": 0.5}, {"high": -0.1}):
        with torch.no_grad(), steered(model, [Edit(site, 1, 7, "cap", **ends)]), read_site(model, site, [1]) as found:
            model(TOKENS)
        assert torch.equal(found[1][..., 7], torch.full((2, 12), next(iter(ends.values()))))


@pytest.mark.parametrize("kind", MADE)
def test_no_edit_and_one_that_changes_nothing_leave_every_bit(models, kind):
    model, site = models[kind], site_named("auto", models[kind])
    plain = logits(model)
    assert torch.equal(logits(model, edits=[]), plain)
    assert torch.equal(logits(model, edits=[Edit(site, 1, 7, "scale", 1.0)]), plain)
    nowhere = Edit(site, 1, 7, "set", 9.0, where=(40,))
    assert torch.equal(logits(model, edits=[nowhere, Edit(site, 0, 2, "add", 0.0)]), plain)


def test_edits_are_made_in_the_order_given_on_top_of_each_other(gpt2):
    model, site = gpt2
    first, then = Edit(site, 1, 7, "set", 2.0), Edit(site, 1, 7, "add", 1.0)
    for edits, value in (([first, then], 3.0), ([then, first], 2.0)):
        with torch.no_grad(), steered(model, edits), read_site(model, site, [1]) as found:
            model(TOKENS)
        assert (found[1][..., 7] == value).all()


def test_edits_of_several_layers_and_sites_are_made_together(gpt2):
    model, site = gpt2
    residual = site_named("residual", model)
    edits = [Edit(site, 2, 1, "set", 1.0), Edit(residual, 0, 3, "add", 2.0), Edit(site, 0, 5, "ablate")]
    with torch.no_grad(), read_site(model, residual, [0]) as plain:
        with steered(model, edits[2:]):
            model(TOKENS)
        with steered(model, edits), read_site(model, site, [0, 2]) as found, read_site(model, residual, [0]) as after:
            model(TOKENS)
    assert (found[2][..., 1] == 1).all() and (found[0][..., 5] == 0).all()
    assert after[0].shape == plain[0].shape and not torch.equal(logits(model), logits(model, edits=edits))


def test_edits_of_one_module_by_two_sites_keep_their_order(gpt2):
    """A feature of a coder, and a neuron that it is made of: each sees what the one before left."""
    model, site = gpt2
    coded = coded_site(model, site)
    for edits in ([neuron := Edit(site, 1, 7, "set", 3.0), Edit(coded, 1, 2, "set", 5.0)],):
        with torch.no_grad(), steered(model, edits), read_site(model, site, [1]) as found:
            model(TOKENS)
        assert not torch.allclose(found[1][..., 7], torch.tensor(3.0))
        with torch.no_grad(), steered(model, [*edits, neuron]), read_site(model, site, [1]) as found:
            model(TOKENS)
        assert (found[1][..., 7] == 3).all()


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize(
    ("where", "edited"),
    [("all", range(12)), ("prompt", range(8)), ("generated", range(8, 12)), ((0, 5, 11, 50), (0, 5, 11))],
)
def test_an_edit_is_made_where_it_is_asked_for_and_nowhere_else(models, kind, where, edited):
    model, site = models[kind], site_named("auto", models[kind])
    with torch.no_grad(), read_site(model, site, [1]) as plain:
        model(TOKENS)
    force = Edit(site, 1, 7, "set", 9.0, where=where)
    with torch.no_grad(), steered(model, [force], prompt=8), read_site(model, site, [1]) as found:
        model(TOKENS)
    expected = plain[1].clone()
    expected[:, list(edited), 7] = 9.0
    assert torch.equal(found[1], expected)


def test_a_condition_is_met_token_by_token(gpt2):
    model, site = gpt2
    with torch.no_grad(), read_site(model, site, [0, 1]) as plain:
        model(TOKENS)
    for layer in (None, 0, 1):
        other = plain[1 if layer is None else layer][..., 3]
        level = float(other.median())
        edit = Edit(site, 1, 7, "set", 9.0, when=Above(3, level, layer))
        with torch.no_grad(), steered(model, [edit]), read_site(model, site, [1]) as found:
            model(TOKENS)
        assert torch.equal(found[1][..., 7], torch.where(other > level, 9.0, plain[1][..., 7]))
        assert 0 < int((other > level).sum()) < other.numel()


def test_a_condition_sees_what_earlier_edits_left(gpt2):
    model, site = gpt2
    edit = Edit(site, 1, 7, "set", 9.0, when=Above(3, 100.0))
    below = Edit(site, 1, 7, "set", 9.0, when=Above(3, 100.0, layer=0))
    for edits, met in (
        ([Edit(site, 1, 3, "set", 101.0), edit], True),
        ([edit, Edit(site, 1, 3, "set", 101.0)], False),
        ([below, Edit(site, 0, 3, "set", 101.0)], True),  # of a layer before: all of its edits
    ):
        with torch.no_grad(), steered(model, edits), read_site(model, site, [1]) as found:
            model(TOKENS)
        assert bool((found[1][..., 7] == 9).all()) == met


def everywhere(site):
    """Edits that show whether tokens are told apart rightly: all, prompt, generated, chosen and on a condition."""
    return [
        Edit(site, 0, 3, "add", 0.3),
        Edit(site, 1, 7, "set", 2.0, where="prompt"),
        Edit(site, 1, 9, "set", 2.0, where="generated"),
        Edit(site, 0, 5, "set", 3.0, where=(0, 3, 9, 10)),
        Edit(site, 1, 2, "add", 1.0, when=Above(3, 0.01, layer=0)),
    ]


@torch.no_grad()
def written(model, tokens, edits, mask=None, **options):
    """(tokens, logits of every step) of greedy text of 6 tokens."""
    mask = torch.ones_like(tokens) if mask is None else mask
    with steered(model, edits, prompt=tokens.shape[1]):
        found = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return found.sequences[:, tokens.shape[1] :], torch.stack(found.logits, 1)


@pytest.fixture(scope="module")
def any_model(models):
    """A model by its kind, made once."""
    made = dict(models)

    def of(kind):
        if kind not in made:
            made[kind] = tiny_model(kind)
        return made[kind]

    return of


@pytest.mark.parametrize("kind", [*MADE, *TINY])
def test_text_is_the_same_with_and_without_a_cache(any_model, kind):
    model = any_model(kind)
    edits = everywhere(site_named("auto", model))
    with_cache, without = (written(model, TOKENS, edits, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache[0], without[0])
    assert (with_cache[1] - without[1]).abs().max() < 1e-4
    plain = written(model, TOKENS, [])
    assert (with_cache[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["crate", "gpt2", "llama"])
def test_every_written_token_is_edited(models, kind):
    """One pass over the finished text, steered likewise, says at every step what the cache said."""
    model = models[kind]
    for edits in ([edit] for edit in everywhere(site_named("auto", model))):
        tokens, steps = written(model, TOKENS, edits)
        whole = logits(model, torch.cat([TOKENS, tokens], 1), edits, prompt=12)
        assert (whole[:, 11:-1] - steps).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["crate", "gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_on_the_left_changes_nothing(any_model, kind, use_cache):
    model = any_model(kind)
    edits = everywhere(site_named("auto", model))
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), TOKENS], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(TOKENS)], 1)
    mask[1, 4:6] = 0  # rows of different lengths
    found = written(model, padded, edits, mask, use_cache=use_cache)
    for row, start in ((0, 0), (1, 2)):
        alone = written(model, TOKENS[row : row + 1, start:], edits, use_cache=use_cache)
        assert torch.equal(found[0][row], alone[0][0])
        assert (found[1][row] - alone[1][0]).abs().max() < 1e-4


def test_padding_is_not_edited(gpt2):
    model, site = gpt2
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    with torch.no_grad(), steered(model, [Edit(site, 1, 7, "set", 9.0)]), read_site(model, site, [1]) as found:
        model(TOKENS, attention_mask=mask)
    assert torch.equal(found[1][..., 7] == 9, mask.bool())


def test_a_cache_that_is_handed_over_by_oneself_is_counted(gpt2):
    model, site = gpt2
    edits = [Edit(site, 1, 7, "set", 9.0, where=(9,)), Edit(site, 0, 2, "set", 4.0, where="generated")]
    whole = logits(model, edits=edits, prompt=8)
    with torch.no_grad(), steered(model, edits, prompt=8):
        first = model(TOKENS[:, :8], use_cache=True)
        rest = model(TOKENS[:, 8:], past_key_values=first.past_key_values)
        again = model(TOKENS[:, :8], use_cache=True)
        by_place = model(TOKENS[:, 8:], again.past_key_values, torch.ones_like(TOKENS))
    assert (rest.logits - whole[:, 8:]).abs().max() < 1e-5
    assert torch.equal(by_place.logits, rest.logits)


def test_beams_and_a_static_cache_are_steered_too(models):
    model = models["llama"]
    site = site_named("auto", model)
    edits = [Edit(site, 1, 7, "set", 2.0, where="prompt"), Edit(site, 1, 9, "set", 2.0, where="generated")]
    beams = written(model, TOKENS, edits, num_beams=2)[0]
    assert torch.equal(beams, written(model, TOKENS, edits, num_beams=2, use_cache=False)[0])
    static = written(model, TOKENS, edits, cache_implementation="static", disable_compile=True)
    assert (static[1] - written(model, TOKENS, edits)[1]).abs().max() < 1e-4
    chosen = [Edit(site, 1, 7, "set", 2.0, where=(3,))]
    with pytest.raises(UserError, match=r"mask does not show which tokens are padding.*leave cache_implementation out"):
        written(model, TOKENS, chosen, cache_implementation="static", disable_compile=True)


def test_a_cache_without_a_length_is_refused_only_where_places_matter(any_model):
    """Mamba keeps a state: only edits of all tokens can be made without knowing how many came before."""
    model = any_model("mamba")
    site = site_named("auto", model)
    force = Edit(site, 1, 7, "set", 2.0)
    with_cache, without = (written(model, TOKENS, [force], use_cache=use) for use in (True, False))
    assert torch.equal(with_cache[0], without[0]) and (with_cache[1] - without[1]).abs().max() < 1e-4
    chosen = [Edit(site, 1, 7, "set", 2.0, where="generated")]
    with pytest.raises(UserError, match=r"cache does not say how many tokens it holds.*use_cache=False"):
        written(model, TOKENS, chosen)
    assert written(model, TOKENS, chosen, use_cache=False)[0].shape == (2, 6)


def coded_site(model, site, replace=False, **by_layer):
    """Random autoencoders of layers 0 and 1."""
    coders = {}
    with torch.no_grad(), read_site(model, site, [0]) as found:
        model(TOKENS)
    for layer in (0, 1):
        config = CoderConfig("topk", found[0].shape[-1], 24, k=5)
        coders[layer] = SparseCoder(config, Origin(pattern=site.pattern, layer=layer), seed=layer)
        with torch.no_grad():
            coders[layer].bias.normal_(0, 0.01)
    return CodedSite("sae/tiny", site.pattern, coders, {}, replace)


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
@pytest.mark.parametrize("replace", [False, True])
def test_features_are_edited_by_difference_or_in_place(models, kind, replace):
    model, site = models[kind], site_named("auto", models[kind])
    coded = coded_site(model, site, replace)
    coder = coded.coders[1]

    def change(x):
        codes = coder.encode(x)
        edited = codes.clone()
        edited[..., 3], edited[..., 4] = 2.0, edited[..., 4] + 1.0
        x.copy_(coder.decode(edited) if replace else x + (coder.decode(edited) - coder.decode(codes)))

    edits = [Edit(coded, 1, 3, "set", 2.0), Edit(coded, 1, 4, "add", 1.0)]
    assert torch.equal(logits(model, edits=edits), by_hand(model, site, 1, change))
    same = logits(model, edits=[Edit(coded, 1, 3, "scale", 1.0)])
    assert torch.equal(same, logits(model)) != replace  # in place of x stands what the coder makes of it
    with_cache, without = (written(model, TOKENS, edits, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache[0], without[0])


def test_features_are_edited_together_whatever_is_edited_between(gpt2):
    """Else the second edit would see a code of the first one's activations, and the order of layers would matter."""
    model, site = gpt2
    coded = coded_site(model, site)
    one, two, other = Edit(coded, 1, 3, "set", 2.0), Edit(coded, 1, 4, "set", 1.0), Edit(coded, 0, 3, "set", 2.0)
    assert torch.equal(logits(model, edits=[one, two, other]), logits(model, edits=[one, other, two]))


def test_steered_logits_equal_those_of_the_authors():
    path = FIXTURES / "reference-crate-2l.pt"
    model = from_reference(load_checkpoint(path), path)
    expected = load_file(FIXTURES / "reference-crate-2l.expected.safetensors")
    force = Edit(site_named("auto", model), 1, 7, "set", 5.0)
    found = logits(model, expected["input_ids"], [force])
    assert (found - expected["steered_logits.layer_last.neuron_7.value_5"]).abs().max() < 1e-5
    generated = Edit(site_named("auto", model), 1, 7, "set", 5.0, where="generated")
    found = logits(model, expected["input_ids"], [generated], prompt=20)
    assert (found[:, :20] - expected["logits"][:, :20]).abs().max() < 1e-5
    # The neuron is of the last layer, so its own position is all that it can change.
    assert (found - expected["steered_logits.layer_last.neuron_7.value_5"])[:, 20:].abs().max() < 1e-5


def a_record(index, values, maximum=None):
    """The record of a neuron that had these activations, in bins of their own."""
    values = np.array(values, dtype=float)
    low, count = np.unique(values, return_counts=True)
    moments = Moments(len(values), float(values.mean()), 1.0, 0.0, 3.0, float(values.max()))
    histogram = Histogram(low, low + 0.1, count)
    return NeuronRecord(NeuronId("run", "mlp", 1, index), (), (), moments, 0.5, histogram=histogram)


@pytest.fixture
def recorded(tmp_path, gpt2, monkeypatch):
    """A run with records of three neurons, of a model that nobody asks more of than what it is."""
    monkeypatch.setattr(Run, "fingerprint", lambda _run: "ab")
    run = Run(tmp_path)
    claim(run.records("mlp"), {"site": gpt2[1].pattern, "model_sha256": "ab"})
    rare = a_record(2, [0.0] * 9999 + [4.0])
    usual = a_record(1, [*np.arange(2000) / 100])
    never = a_record(0, [0.0] * 10)
    write_records(layer_file(run.records("mlp"), 1), [never, usual, rare])
    return run


def test_units_are_the_neurons_own(recorded, gpt2):
    site = gpt2[1]
    maximum, quantile, mean = 19.99, 19.97, 9.995
    for unit, size in (("maximum", maximum), ("quantile", quantile), ("mean", mean)):
        for operation in ("set", "add"):
            [edit] = in_raw_units(recorded, [Edit(site, 1, 1, operation, 2.0, unit, where="prompt")])
            assert edit.value == pytest.approx(2 * size, rel=1e-3)
            assert (edit.unit, edit.operation, edit.where) == ("raw", operation, "prompt")
    [cap] = in_raw_units(recorded, [Edit(site, 1, 1, "cap", low=0.5, high=1.0, unit="maximum")])
    assert (cap.low, cap.high) == pytest.approx((maximum / 2, maximum))
    [upper] = in_raw_units(recorded, [Edit(site, 1, 1, "cap", high=1.0, unit="maximum")])
    assert (upper.low, upper.high) == (-math.inf, pytest.approx(maximum))
    [to_mean] = in_raw_units(recorded, [Edit(site, 1, 1, "ablate", unit="mean")])
    assert (to_mean.operation, to_mean.value) == ("set", pytest.approx(mean))
    raw = Edit(site, 1, 9, "scale", 3.0)  # needs no record
    assert in_raw_units(recorded, [raw]) == [raw]


def test_multiples_of_nothing_are_refused(recorded, gpt2):
    site = gpt2[1]
    with pytest.raises(
        UserError, match=r"edit of mlp/1:2: its 99.9 % quantile is 0 .* multiples of its maximum or raw"
    ):
        in_raw_units(recorded, [Edit(site, 1, 2, "set", 4.0, "quantile")])
    with pytest.raises(UserError, match="edit of mlp/1:0: its maximum is 0 in the records; give multiples of raw|raw"):
        in_raw_units(recorded, [Edit(site, 1, 0, "set", 4.0, "maximum")])


def test_a_unit_without_fitting_records_names_the_fix(recorded, gpt2, monkeypatch):
    model, site = gpt2
    four = Edit(site, 1, 1, "set", 4.0, "maximum")
    with pytest.raises(
        UserError, match=r"residual: no records, .*run `cratescope collect .* --site residual`, or give"
    ):
        in_raw_units(recorded, [Edit(site_named("residual", model), 1, 1, "set", 4.0, "maximum")])
    with pytest.raises(UserError, match="no neuron 3; this layer has neurons 0 to 2"):
        in_raw_units(recorded, [Edit(site, 1, 3, "set", 4.0, "maximum")])
    with pytest.raises(UserError, match="layer-00.parquet: no such file"):
        in_raw_units(recorded, [Edit(site, 0, 1, "set", 4.0, "maximum")])
    with pytest.raises(UserError, match="its unit is its maximum; turn it into numbers by in_raw_units"):
        logits(model, edits=[four])
    monkeypatch.setattr(Run, "fingerprint", lambda _run: "cd")
    with pytest.raises(UserError, match="records of another model or site; delete it and run `cratescope collect`"):
        in_raw_units(recorded, [four])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (("set", math.nan), "its number is not finite"),
        (("add", math.inf), "its number is not finite"),
        (("scale", -math.inf), "its number is not finite"),
        (("scale", 1.0, "maximum"), "scale takes no unit maximum"),
        (("ablate", 1.0), "ablate takes no value"),
        (("ablate", 0.0, "maximum"), "ablate takes no value, and as a unit only raw"),
        (("cap",), "cap takes low <= high, at least one of them"),
        (("cap", 0.0, "raw", 2.0, 1.0), "cap takes low <= high, .* not 2 and 1"),
        (("cap", 0.0, "raw", math.nan), "its number is not finite"),
        (("cap", 0.0, "raw", math.inf), "cap takes low <= high"),
        (("set", 0.0, "raw", 0.0), "set takes a value; low and high are of cap"),
    ],
)
def test_what_is_no_edit_is_refused_in_one_line(gpt2, numbers, message):
    with pytest.raises(UserError, match=f"edit of mlp/1:7: .*{message}") as said:
        Edit(gpt2[1], 1, 7, *numbers)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"where": ()}, "name at least one position"),
        ({"where": (0, -1)}, "counted from 0"),
        ({"when": Above(3, math.nan)}, "condition needs a finite number"),
        ({"when": Above(3, 0.0, layer=2)}, "the same layer or one before it"),
        ({"when": Above(-1, 0.0)}, "condition needs"),
    ],
)
def test_a_place_that_there_is_not_is_refused(gpt2, place, message):
    with pytest.raises(UserError, match=message):
        Edit(gpt2[1], 1, 7, "set", 1.0, **place)


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("operation", "push", "no 'push' in unit 'raw'; there are set, add, scale, ablate, cap in raw"),
        ("unit", "volts", "no 'set' in unit 'volts'"),
        ("where", "start", "no place 'start'; there are all, prompt, generated, or positions"),
        ("where", [1, 2], "no place"),
    ],
)
def test_a_word_that_means_nothing_is_refused(gpt2, name, word, message):
    """Tests check types before; nobody else does."""
    edit = Edit(gpt2[1], 1, 7, "set", 1.0)
    object.__setattr__(edit, name, word)
    with pytest.raises(UserError, match=message):
        edit.__post_init__()


def test_neurons_layers_and_sites_that_are_not_there_are_refused(gpt2):
    model, site = gpt2
    with pytest.raises(UserError, match="counted from 0"):
        Edit(site, 1, -1, "ablate")
    with pytest.raises(UserError, match="neuron 64 is out of range; layer 1 has 64"):
        logits(model, edits=[Edit(site, 1, 64, "ablate")])
    with pytest.raises(UserError, match="neuron 64 is out of range; layer 0 has 64"):
        logits(model, edits=[Edit(site, 1, 7, "ablate", when=Above(64, 0.0, 0))])
    with pytest.raises(UserError, match="layer 3 is out of range"):
        logits(model, edits=[Edit(site, 3, 7, "ablate")])
    with pytest.raises(UserError, match="no module 'transformer.h.1.nowhere'"):
        logits(model, edits=[Edit(Site("x", "transformer.h.{layer}.nowhere"), 1, 7, "ablate")])
    with pytest.raises(UserError, match="sae/tiny: layer 2 has no autoencoder"):
        logits(model, edits=[Edit(coded_site(model, site), 2, 7, "ablate")])
    assert torch.equal(logits(model), logits(model, edits=[]))  # no hook was left behind
    assert not model.get_submodule(site.path(1))._forward_hooks


def test_a_site_that_can_only_be_read_is_refused(gpt2):
    model, site = gpt2
    with pytest.raises(UserError, match="a sample of its neurons can be read only; edit the whole site"):
        logits(model, edits=[Edit(site.only({1: torch.tensor([2, 7])}), 1, 0, "ablate")])
    mixtral = tiny_model("mixtral")
    with pytest.raises(UserError, match="neurons of experts can be read only"):
        logits(mixtral, edits=[Edit(site_named("auto", mixtral), 1, 0, "ablate")])


def test_the_prompt_has_to_be_told_where_it_matters(gpt2):
    model, site = gpt2
    with pytest.raises(UserError, match="give steered the length of the prompt, for edits of generated"):
        logits(model, edits=[Edit(site, 1, 7, "ablate", where="generated")])


def test_a_number_beyond_the_format_is_refused(gpt2):
    model, site = gpt2
    edit = Edit(site, 1, 7, "set", 1e39)
    with pytest.raises(UserError, match=r"edit of mlp/1:7: 1e\+39 is beyond the range of float32; give a smaller"):
        logits(model, edits=[edit])


def spelled(text):
    return read_edit(text, lambda name: Site(name or "mlp", "transformer.h.{layer}.mlp.act"))


MLP = Site("mlp", "transformer.h.{layer}.mlp.act")


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("1:37=4x", Edit(MLP, 1, 37, "set", 4.0, "maximum")),
        ("1:37=-2.5e-1", Edit(MLP, 1, 37, "set", -0.25)),
        ("0:3=1q", Edit(MLP, 0, 3, "set", 1.0, "quantile")),
        ("0:3=mean", Edit(MLP, 0, 3, "set", 1.0, "mean")),
        ("1:37+=2", Edit(MLP, 1, 37, "add", 2.0)),
        (" 1:37 += -.5x ", Edit(MLP, 1, 37, "add", -0.5, "maximum")),
        ("1:37*=0", Edit(MLP, 1, 37, "scale", 0.0)),
        ("1:37<=3", Edit(MLP, 1, 37, "cap", high=3.0)),
        ("1:37 >= 0.5x", Edit(MLP, 1, 37, "cap", low=0.5, unit="maximum")),
        ("1:37=0@generated", Edit(MLP, 1, 37, "set", 0.0, where="generated")),
        ("1:37=0 @ 0,3,4", Edit(MLP, 1, 37, "set", 0.0, where=(0, 3, 4))),
        ("1:37=0@all if 12>0.5", Edit(MLP, 1, 37, "set", 0.0, when=Above(12, 0.5))),
        ("1:37=4x if 0:12 > -1", Edit(MLP, 1, 37, "set", 4.0, "maximum", when=Above(12, -1.0, 0))),
    ],
)
def test_edits_are_read_as_they_are_written(text, edit):
    assert spelled(text) == edit


def test_a_site_may_stand_before_the_layer():
    named = {text: spelled(text).site.name for text in ("sae/bt16/1:5=2x", "residual/0:1*=2 if 0:3>1")}
    assert list(named.values()) == ["sae/bt16", "residual"]
    path = "transformer.h.{layer}.mlp.act:input"
    assert spelled(f"{path}/1:5=2").site.name == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 1: expected LAYER:NEURON such as 1:37, not the end"),
        ("1.37=4x", "character 1: expected LAYER:NEURON such as 1:37, not '1.37=4x'"),
        ("-1:37=4x", "character 1: expected LAYER:NEURON"),
        ("1:37", "character 5: expected one of = += *= <= >=, not the end"),
        ("1:37==4", "character 6: expected a number such as 2, 4x or 1q, or mean, not '=4'"),
        ("1:37=nan", "character 6: expected a number"),
        ("1:37=inf", "character 6: expected a number"),
        ("1:37+=mean", "character 7: expected a number such as 2, 4x or 1q, not 'mean'"),
        ("1:37*=2x", "character 8: expected @WHERE, a condition such as `if 12>0.5`, or the end, not 'x'"),
        ("1:37=4y", "character 7: expected @WHERE"),
        ("1:37=4x@start", "character 9: expected all, prompt, generated, or positions such as 0,3, not 'start'"),
        ("1:37=4x@1,", "character 10: expected @WHERE"),
        ("1:37=4x if", "character 11: expected a neuron such as 12 or 0:12, not the end"),
        ("1:37=4x if 0:12<1", "character 16: expected >, not '<1'"),
        ("1:37=4x if 0:12>x", "character 17: expected a number such as 0.5, not 'x'"),
        ("1:37=\u0664", "character 6: expected a number"),
        ("1:37=1e999", "edit of mlp/1:37: its number is not finite"),
        ("1:37=4 if 2:3>1", "the same layer or one before it"),
    ],
)
def test_what_cannot_be_read_names_the_character(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as said:
        spelled(text)
    assert len(str(said.value).splitlines()) == 1


def steer_run(runs_folder, *edits, **options):
    return steer(SteerConfig(runs_folder / "crate", tuple(edits), "the cat", tokens=4, device="cpu", **options))


def test_steer_shows_text_and_predictions_beside_the_plain_ones(runs_folder, tmp_path):
    found = steer_run(runs_folder, "0:3=40", json=tmp_path / "found.json")
    run = Run(runs_folder / "crate")
    model = run.load_model().eval()
    ids = torch.tensor([run.tokenizer("the cat").input_ids])
    before = logits(model, ids)[0].double()
    after = logits(model, ids, [Edit(site_named("auto", model), 0, 3, "set", 40.0)])[0].double()
    change = (after - before)[-1]
    assert found.rises[0].token == int(change.argmax()) and found.falls[0].token == int(change.argmin())
    assert found.rises[0].change == pytest.approx(float(change.max())) and len(found.falls) == 10
    assert found.rises[0].steered == pytest.approx(float(after[-1].softmax(-1)[change.argmax()]))
    p, q = after[-1].log_softmax(-1), before[-1].log_softmax(-1)
    assert found.kl_prompt == pytest.approx(float((p.exp() * (p - q)).sum())) and found.kl_prompt > 1e-4
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert found.plain == run.tokenizer.decode(text[0, ids.shape[1] :])
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["kl_generated"] == found.kl_generated and kept["rises"][0]["token"] == found.rises[0].token


def test_an_edit_that_changes_nothing_gives_the_same_text_and_no_divergence(runs_folder):
    for temperature in (0.0, 1.0):
        found = steer_run(runs_folder, "0:3*=1", "0:4+=0", temperature=temperature)
        assert found.plain == found.steered and found.kl_prompt == found.kl_generated == 0
    assert steer_run(runs_folder, "0:3*=1", temperature=1.0) == steer_run(runs_folder, "0:3*=1", temperature=1.0)
    several = {steer_run(runs_folder, "0:3*=1", temperature=1.0, seed=seed).plain for seed in range(3)}
    assert len(several) > 1


def test_the_command_prints_them_side_by_side(runs_folder):
    shown = cli.run(
        ["steer", f"{runs_folder / 'crate'}", "--edit", "0:3=40", "0:5*=0", "--prompt", "the cat", "--tokens", "6"]
    )
    assert re.search(r"plain +.* steered", shown) and "KL(steered || plain): " in shown
    assert "rises" in shown and "falls" in shown and "after the 6 generated tokens" in shown


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        ((), {}, "--edit: name at least one, such as 1:37=4x"),
        (("0:3=4x",), {"site": "attention"}, "no records, which a unit is measured by; run `cratescope collect"),
        (("0:9999=1",), {}, "neuron 9999 is out of range; layer 0 has 512"),
        (("7:3=1",), {}, "layer 7 is out of range"),
        (("nowhere/0:3=1",), {}, "no site 'nowhere' for a crate model"),
        (("sae/none/0:3=1",), {}, "no sparse autoencoder 'none'"),
        (("0:3=1e38",), {}, "with these edits the model's logits are not finite; give smaller numbers"),
        (("0:3=1", "0:3"), {}, "--edit '0:3', character 4"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(runs_folder, edits, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        steer_run(runs_folder, *edits, **options)


def test_a_prompt_that_does_not_fit_is_refused(runs_folder):
    long = SteerConfig(runs_folder / "crate", ("0:3=1",), "the cat " * 20, tokens=20, device="cpu")
    with pytest.raises(UserError, match=r"--prompt of \d+ tokens and --tokens 20 are more than the 32 tokens"):
        steer(long)


def test_gradients_go_through_edits(gpt2):
    model, site = gpt2
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    with steered(
        model, [Edit(site, 1, 7, "scale", 2.0), Edit(site, 1, 7, "cap", high=0.5), Edit(site, 1, 8, "ablate")]
    ):
        model(inputs_embeds=embedded).logits[..., 3].sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_a_negative_or_zero_mean_is_set_like_any_other(gpt2):
    _, site = gpt2
    for mean in (-0.25, 0.0):
        assert Edit(site, 1, 7, "set", 1.0, "mean").times(mean) == Edit(site, 1, 7, "set", mean)
    assert Edit(site, 1, 7, "cap", low=0.5, unit="maximum").times(2.0) == Edit(site, 1, 7, "cap", low=1.0)
