"""Reference checkpoints convert to our models with equal numbers, and back bit for bit."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from cratescope.errors import UserError
from cratescope.exchange.config import ConvertConfig
from cratescope.exchange.reference import _names, _transposed, convert, from_reference, load_checkpoint, to_reference
from cratescope.models.presets import CRATE_FIELDS
from cratescope.neurons.sites import read_site, site_named
from cratescope.neurons.steer import Edit, steered

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("reference-crate-2l", "reference-gpt-relu-2l")


@pytest.fixture(scope="module", params=NAMES)
def reference(request):
    """(model, expected tensors) of one reference checkpoint."""
    path = FIXTURES / f"{request.param}.pt"
    return from_reference(load_checkpoint(path), path), load_file(FIXTURES / f"{request.param}.expected.safetensors")


def loss_of(model, expected):
    logits = model(expected["input_ids"]).logits
    return F.cross_entropy(logits.flatten(0, 1), expected["targets"].flatten())


def test_logits_and_loss_equal_the_reference(reference):
    model, expected = reference
    with torch.no_grad():
        assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() < 1e-5
        assert abs(loss_of(model, expected) - expected["loss"]) < 1e-5


def test_activations_at_the_site_equal_the_reference(reference):
    model, expected = reference
    site = site_named("auto", model)
    layers = range(model.config.n_layer)
    with torch.no_grad(), read_site(model, site, layers) as activations:
        model(expected["input_ids"])
    for layer in layers:
        assert (activations[layer] - expected[f"activations.{layer}"]).abs().max() < 1e-5


def test_gradients_equal_the_reference(reference):
    model, expected = reference
    model.zero_grad()
    loss_of(model, expected).backward()
    checked = 0
    for ours, theirs in _names(model).items():
        if f"grad.{theirs}" in expected:
            grad = model.get_parameter(ours).grad
            wanted = expected[f"grad.{theirs}"]
            assert ((grad.t() if _transposed(model, ours) else grad) - wanted).norm() < 1e-4 * wanted.norm()
            checked += 1
    assert checked == sum(key.startswith("grad.") for key in expected)


def test_a_forced_neuron_steers_the_logits_as_in_the_reference():
    path = FIXTURES / "reference-crate-2l.pt"
    model = from_reference(load_checkpoint(path), path)
    expected = load_file(FIXTURES / "reference-crate-2l.expected.safetensors")
    force = Edit(site_named("auto", model), model.config.n_layer - 1, 7, "set", 5.0)
    with torch.no_grad(), steered(model, [force]):
        logits = model(expected["input_ids"]).logits
    assert (logits - expected["steered_logits.layer_last.neuron_7.value_5"]).abs().max() < 1e-5
    assert (logits - expected["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", [True, False])
def test_converting_there_and_back_is_bit_exact(name, compiled, tmp_path):
    original = load_checkpoint(FIXTURES / f"{name}.pt")
    plain = {key.removeprefix("_orig_mod."): tensor for key, tensor in original["model"].items()}
    original["model"] = {("_orig_mod." if compiled else "") + key: tensor for key, tensor in plain.items()}
    torch.save(original, tmp_path / "in.pt")
    convert(ConvertConfig(tmp_path / "in.pt", tmp_path / "folder"))
    convert(ConvertConfig(tmp_path / "folder", tmp_path / "out.pt"))
    again = load_checkpoint(tmp_path / "out.pt")
    assert again["model"].keys() == original["model"].keys()
    assert all(torch.equal(again["model"][key], original["model"][key]) for key in original["model"])
    assert again["model_args"] == original["model_args"]
    assert again["iter_num"] == original["iter_num"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("_orig_mod.transformer.h.1.ista.weight"), "h.1.ista.weight is missing"),
        (
            lambda state: state.update({"_orig_mod.transformer.extra": torch.zeros(1)}),
            "transformer.extra belongs to no",
        ),
        (
            lambda state: state.update({"_orig_mod.transformer.ln_f.weight": torch.zeros(3)}),
            "has shape (3,), not (32,)",
        ),
    ],
)
def test_a_checkpoint_with_a_wrong_tensor_is_refused_by_its_name(edit, message):
    checkpoint = copy.deepcopy(load_checkpoint(FIXTURES / "reference-crate-2l.pt"))
    edit(checkpoint["model"])
    with pytest.raises(UserError) as error:
        from_reference(checkpoint, "x.pt")
    assert message in str(error.value)


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": {}, "model_args": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="could run code"):
        convert(ConvertConfig(tmp_path / "bomb.pt", tmp_path / "out"))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_with_a_changed_byte_is_refused(tmp_path):
    data = bytearray((FIXTURES / "reference-crate-2l.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "changed.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"changed.pt: damaged \(the CRC-32 of .*; copy it again"):
        convert(ConvertConfig(tmp_path / "changed.pt", tmp_path / "out"))


def test_a_checkpoint_of_the_old_format_is_read(tmp_path):
    checkpoint = load_checkpoint(FIXTURES / "reference-crate-2l.pt")
    torch.save(checkpoint, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pt")["model"].keys() == checkpoint["model"].keys()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    whole = (FIXTURES / "reference-crate-2l.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable"):
        convert(ConvertConfig(tmp_path / "cut.pt", tmp_path / "out"))


@pytest.mark.parametrize("field", CRATE_FIELDS)
def test_a_variant_the_reference_code_cannot_express_is_refused(field):
    path = FIXTURES / "reference-crate-2l.pt"
    model = from_reference(load_checkpoint(path), path)
    vars(model.config)[field] = "another"
    with pytest.raises(UserError, match=f"{field} = another: the reference code has"):
        to_reference(model)


def test_nothing_that_exists_is_overwritten(tmp_path):
    (tmp_path / "letters.txt").write_text("keep me")
    with pytest.raises(UserError, match="exists already"):
        convert(ConvertConfig(FIXTURES / "reference-crate-2l.pt", tmp_path))
    assert (tmp_path / "letters.txt").read_text() == "keep me"


def test_a_gpt2_with_another_activation_is_refused():
    path = FIXTURES / "reference-gpt-relu-2l.pt"
    model = from_reference(load_checkpoint(path), path)
    model.config.activation_function = "gelu_new"
    with pytest.raises(UserError, match="gelu_new"):
        to_reference(model)


def test_an_untied_head_is_refused():
    checkpoint = copy.deepcopy(load_checkpoint(FIXTURES / "reference-crate-2l.pt"))
    checkpoint["model"]["_orig_mod.lm_head.weight"] = checkpoint["model"]["_orig_mod.lm_head.weight"] + 1
    with pytest.raises(UserError, match="differ"):
        from_reference(checkpoint, "x.pt")


@pytest.mark.parametrize("content", [b"", b"just text"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="not a readable"):
        convert(ConvertConfig(tmp_path / "x.pt", tmp_path / "out"))


def with_weight(value):
    def change(checkpoint):
        checkpoint["model"][next(iter(checkpoint["model"]))] = value

    return change


def with_number(value):
    def change(checkpoint):
        (weight,) = (one for name, one in checkpoint["model"].items() if name.endswith("wpe.weight"))
        weight[0] = value

    return change


def as_truth(checkpoint):
    (name,) = (name for name in checkpoint["model"] if name.endswith("wpe.weight"))
    checkpoint["model"][name] = checkpoint["model"][name] > 0


def with_entry(name, value):
    return lambda checkpoint: checkpoint.update({name: value})


def with_argument(name, value):
    return lambda checkpoint: checkpoint["model_args"].update({name: value})


ODD = [
    with_entry("model", [torch.zeros(2)]),
    with_entry("model", {1: torch.zeros(2)}),
    with_entry("model", {}),
    with_entry("model_args", None),
    with_entry("model_args", [1, 2]),
    with_entry("iter_num", "many"),
    with_entry("iter_num", torch.tensor([1, 2])),
    *map(with_weight, ("text", None, [1.0, 2.0], torch.eye(4).to_sparse(), torch.eye(4, dtype=torch.int64))),
    *map(with_weight, (torch.ones(4, dtype=torch.complex64), torch.zeros(3), torch.zeros(()))),
    *map(with_weight, (torch.zeros(1).expand(1 << 40), torch.empty(1 << 40, device="meta"))),
    as_truth,
    *map(with_number, (math.nan, math.inf, -math.inf)),
    *(with_argument("n_layer", value) for value in (10**9, 0, "2", 2.5, True, None)),
    *(with_argument("n_embd", value) for value in (-64, 10**9)),
    *(with_argument("n_head", value) for value in (7, True, 0)),
    *(with_argument(name, 10**12) for name in ("vocab_size", "block_size")),
]


@pytest.mark.parametrize("kind", ["crate", "gpt-relu"])
def test_odd_contents_of_a_checkpoint_are_one_line_and_nothing_is_written(kind, tmp_path):
    source = tmp_path / "odd.pt"
    for change in ODD:
        checkpoint = torch.load(Path(__file__).parent / "fixtures" / f"reference-{kind}-2l.pt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, source)
        with pytest.raises(UserError) as refused:
            convert(ConvertConfig(source, tmp_path / "out"))
        assert str(refused.value).startswith(f"{source}: ") and "\n" not in str(refused.value)
        assert [path.name for path in tmp_path.iterdir()] == ["odd.pt"]


def test_what_stands_where_the_folder_should_go_is_left_alone(tmp_path):
    source = Path(__file__).parent / "fixtures" / "reference-crate-2l.pt"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "link", Path("/dev/null")):
        with pytest.raises(UserError, match="exists already"):
            convert(ConvertConfig(source, out))
