"""The fused loss equals the ordinary one, in value and gradient, whatever the shape, the chunks or the logits."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from cratescope.lm import loss
from cratescope.models.presets import build, preset_config

SLOW_PAGES = settings(deadline=None, max_examples=40)


def reference(hidden, weight, labels):
    """Loss and its gradients by hidden states and weight in float64, by torch's own functions."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logits = hidden @ weight.t()
    value = F.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum().clamp(min=1)
    return value, *torch.autograd.grad(value, (hidden, weight))


def fused(hidden, weight, labels, **options):
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
    value = loss.linear_cross_entropy(hidden, weight, labels, **options)
    return value, *torch.autograd.grad(value, (hidden, weight))


def assert_close(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        scale = max(1.0, other.abs().max().item())
        assert torch.isfinite(mine).all()
        assert (mine.double() - other).abs().max().item() <= tolerance * scale


@pytest.fixture
def chunks(monkeypatch):
    def of(rows, columns):
        monkeypatch.setattr(loss, "CHUNK", rows)
        monkeypatch.setattr(loss, "TILE", 4 * columns)  # bytes of float32

    return of


@st.composite
def problems(draw):
    n, d, v = draw(st.integers(1, 40)), draw(st.integers(1, 24)), draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) / d**0.5
    labels = torch.randint(v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    return hidden, weight, labels, draw(st.sampled_from([1, 3, 16, 256])), draw(st.sampled_from([1, 7, 32, 1024]))


@SLOW_PAGES
@given(problems())
def test_loss_and_gradients_equal_a_float64_reference_for_any_shape_and_chunks(problem):
    hidden, weight, labels, rows, columns = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK", rows)
        patch.setattr(loss, "TILE", 4 * columns)  # bytes of float32
        assert_close(fused(hidden, weight, labels), reference(hidden, weight, labels), 1e-5)


@SLOW_PAGES
@given(problems())
def test_in_bfloat16_they_agree_to_a_hundredth(problem):
    hidden, weight, labels, rows, columns = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK", rows)
        patch.setattr(loss, "TILE", 4 * columns)  # bytes of float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = fused(hidden, weight, labels)
        theirs = reference(hidden.bfloat16(), weight.bfloat16(), labels)
        assert ours[1].dtype == ours[2].dtype == torch.float32
        assert_close(ours, theirs, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_give_finite_exact_results(dtype, chunks):
    """Powers of two, so that the logits have no rounding of their own: the smallest difference between two is 8192."""
    chunks(4, 8)
    generator = torch.Generator().manual_seed(0)
    hidden = 128.0 * torch.randint(-1, 2, (50, 2), generator=generator)
    weight = 64.0 * torch.randint(-1, 2, (30, 2), generator=generator)
    labels = torch.randint(30, (50,), generator=generator)
    assert (hidden @ weight.t()).abs().max() > 1e4
    ours = fused(hidden.to(dtype), weight.to(dtype), labels)
    theirs = reference(hidden, weight, labels)
    assert_close(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-2)


def test_the_worst_label_of_a_certain_prediction_costs_the_whole_difference():
    hidden, weight = torch.tensor([[100.0]]), torch.tensor([[100.0], [-100.0]])
    value, _, _ = fused(hidden, weight, torch.tensor([1]))
    assert value.item() == 20000.0
    assert fused(hidden, weight, torch.tensor([0]))[0].item() == 0.0


def test_a_nan_in_the_hidden_states_is_not_hidden():
    hidden = torch.ones(3, 2)
    hidden[1, 0] = torch.nan
    assert torch.isnan(fused(hidden, torch.ones(5, 2), torch.tensor([0, 1, 2]))[0])


def test_token_losses_are_those_of_the_full_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 8, generator=generator), torch.randn(1100, 8, generator=generator)
    labels = torch.randint(1100, (300,), generator=generator)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    torch.testing.assert_close(loss.token_losses(hidden, weight, labels), expected)


@pytest.mark.parametrize("label", [-1, 11])
def test_a_label_that_is_no_token_is_refused_also_without_gradients(label):
    hidden, weight, labels = torch.randn(3, 4), torch.randn(11, 4), torch.tensor([1, label, 2])
    with pytest.raises(IndexError, match=f"{label}, but there are 11 tokens|from {label} to"):
        loss.token_losses(hidden, weight, labels)


def test_a_second_derivative_is_refused_and_not_left_out():
    hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (3, 11))
    value = loss.linear_cross_entropy(hidden, weight, torch.tensor([1, 5, 2]))
    (grad,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (value + grad.square().sum()).backward()


def test_the_number_of_items_divides_the_sum():
    hidden, weight, labels = torch.randn(6, 4), torch.randn(9, 4), torch.tensor([1, 2, 3, -100, 5, 6])
    mean, whole = (fused(hidden, weight, labels, n_items=n)[0] for n in (None, 1))
    assert mean.item() == pytest.approx(whole.item() / 5)


def test_only_wanted_gradients_are_formed():
    hidden, weight, labels = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True), torch.arange(6)
    loss.linear_cross_entropy(hidden, weight, labels).backward()
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), labels), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_the_operator_keeps_the_rules_of_the_compiler():
    arguments = (torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True))
    labels = torch.tensor([1, 2, 3, -100, 5, 6])
    operator = torch.ops.cratescope.linear_cross_entropy
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (*arguments, labels, torch.float32, True, True), test_utils=tests)


@pytest.mark.parametrize("preset", ["crate-1l", "gpt2-1l", "crate-h-lag-1l", "gpt2-h-lag-1l"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_fused_model_has_the_loss_and_gradients_of_the_plain_one(preset, autocast):
    """With the tied head, whose weight gets gradients from the embedding as well."""
    tokens = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    models = [build(preset_config(preset, 320, 16, 0), seed=0).train() for _ in range(2)]
    loss.fuse(models[1])
    losses = []
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses.append(model(tokens, labels=tokens).loss)
        losses[-1].backward()
    tolerance = {"rtol": 0.05, "atol": 4e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=2e-3 if autocast else 1e-5)
    for (name, mine), other in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name, **tolerance)


@pytest.mark.parametrize("preset", ["crate-1l", "gpt2-1l", "crate-h-lag-1l", "gpt2-lag-1l"])
def test_the_penalty_is_the_mean_over_tokens_of_the_sum_of_activations(preset):
    tokens = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    plain, fused = (build(preset_config(preset, 320, 16, 0), seed=0).train() for _ in range(2))
    loss.fuse(fused, lambda activations: 0.01 * activations)
    seen = []
    name = "transformer.h.0.mlp.act" if preset == "gpt2-1l" else "transformer.h.0.ista.codes"
    plain.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[2]))
    wanted = plain(tokens, labels=tokens).loss + 0.01 * seen[0].sum(-1).mean()
    for _ in range(2):  # the second time is not about the first one's activations
        found = fused(tokens, labels=tokens).loss
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5) and seen[0].any()
    halves = [fused(half[None], labels=half[None], num_items_in_batch=30).loss for half in tokens]
    assert sum(halves).item() == pytest.approx(wanted.item(), rel=1e-5), "micro-batches add up"
    sum(halves).backward(), wanted.backward()
    for (name, mine), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name, rtol=1e-4, atol=1e-6)


def test_a_fused_model_without_labels_still_gives_logits():
    model = build(preset_config("crate-1l", 320, 16, 0), seed=0).eval()
    tokens = torch.arange(8)[None]
    expected = model(tokens).logits
    assert torch.equal(loss.fuse(model)(tokens).logits, expected)


def test_a_copy_of_a_fused_model_is_a_model_of_its_own():
    model = loss.fuse(build(preset_config("crate-1l", 320, 16, 0), seed=0)).eval()
    tokens = torch.arange(8)[None]
    other, expected = copy.deepcopy(model), model(tokens).logits
    torch.nn.init.zeros_(other.lm_head.weight)
    assert not other(tokens).logits.any() and torch.equal(model(tokens).logits, expected)
