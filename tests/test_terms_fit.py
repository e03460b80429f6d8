"""Terms are chosen on tokens that no protocol uses, and are the same whatever is fitted beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import processes
from cratescope.errors import UserError
from cratescope.explain.config import TermsConfig
from cratescope.explain.protocols import PROTOCOLS, ExplanationSet, Pick, Protocol
from cratescope.explain.terms import fit
from cratescope.explain.terms.features import Features, Lexicon
from cratescope.explain.terms.fit import DEAD, NOTHING, TOO_FEW, Skipped, explain, identity
from cratescope.explain.terms.language import load_language
from cratescope.explain.terms.phrases import read, written
from cratescope.explain.terms.predict import TermsSimulator, predict
from cratescope.explain.terms.selection import selected
from cratescope.explain.terms.texts import Texts, Vocabulary
from cratescope.neurons.records import Moments, NeuronId, NeuronRecord, Stratum, Window

PIECES = (
    " the| of| cat| river|,|.| (|)| 12| 1995| red| blue| Paris| army| soldiers| run|ning|\n| he| they| said| and"
    "| not| x"
)
STRINGS = PIECES.split("|")
VOCABULARY, LEXICON = Vocabulary.of(STRINGS), Lexicon(load_language())
EVERY = tuple(PROTOCOLS.values())
EXCERPTS, LENGTH = 400, 128
RULES = {
    "numbers": "numbers (+10)",
    "colours": "colours (+10), brackets (-5)",
    "after": "numbers after colours (+10)",
    "pieces": "the rest of a word (+10), war and weapons (+6), commas (+3)",
    "among": "among punctuation (+10)",
}


def corpus(seed=0):
    """Tokens (excerpts, length), a word seldom split."""
    tokens = np.random.default_rng(seed).integers(0, len(STRINGS), (EXCERPTS, LENGTH))
    tokens[tokens == STRINGS.index("ning")] = STRINGS.index(" of")
    after = np.roll(tokens == STRINGS.index(" run"), 1, 1)
    after[:, 0] = False
    tokens[after] = STRINGS.index("ning")
    return tokens


def record(activations, index=0, seed=0, tokens=None):
    """A record of windows drawn as `collect` does, but that those by rank and level may meet those by quantile."""
    tokens = corpus() if tokens is None else tokens
    rng = np.random.default_rng([seed, index])

    def window(excerpt, place, width=64):
        start = min(max(place - width // 2, 0), LENGTH - width)
        inside = slice(start, start + width)
        return Window(tokens[excerpt, inside], activations[excerpt, inside], excerpt, start, place - start)

    def drawn(low, high, n, excerpts, width=64):
        return tuple(window(excerpt, int(rng.integers(LENGTH)), width) for excerpt in rng.choice(excerpts, n).tolist())

    order = np.argsort(-activations.max(1), kind="stable")
    top = tuple(window(excerpt, int(activations[excerpt].argmax())) for excerpt in order[:50].tolist())
    rest = order[50:]
    quantiles = tuple(Stratum(0, 1, drawn(0, 1, 10, rest[20:])) for _ in range(5))
    short = tuple(Stratum(0, 1, drawn(0, 1, 20, rest[20:], 8)) for _ in range(11))
    moments = Moments(tokens.size, 0.0, 1.0, None, None, 1.0)
    density = float((activations != 0).mean())
    random = tuple(window(int(excerpt), int(rng.integers(LENGTH))) for excerpt in rest[:20].tolist())
    ids = NeuronId("model", "codes", 0, index)
    return NeuronRecord(ids, top, random, moments, density, quantiles, by_rank=short, by_level=short)


def activations_of(text, noise=0.03, seed=0):
    tokens = corpus()
    rows = [Window(row, np.zeros(LENGTH, np.float32), 0, 0, 0) for row in tokens]
    values = np.array(TermsSimulator(VOCABULARY, LEXICON)(text, rows)) / 10
    return (values + noise * np.random.default_rng(seed).standard_normal(values.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def records():
    return [record(activations_of(text, seed=number), number) for number, text in enumerate(RULES.values())]


def texts_of(found):
    return [one.reason if isinstance(one, Skipped) else written(one) for one in found]


@pytest.mark.parametrize("name", ["numbers", "colours", "pieces", "among"])
def test_a_rule_that_the_language_has_a_word_for_is_found(records, name):
    place = list(RULES).index(name)
    (found,) = explain([records[place]], VOCABULARY, LEXICON, TermsConfig())
    windows = PROTOCOLS["uniform"].windows(records[place])
    truth = np.concatenate([window.activations for window in windows])
    simulated = np.concatenate(TermsSimulator(VOCABULARY, LEXICON)(written(found), windows))
    assert np.corrcoef(truth, simulated)[0, 1] > 0.75  # what stands before a window is not known
    assert abs(found[0].weight) == 10


def test_a_joint_is_found_with_joints_only(records):
    place = [list(RULES).index("after")]
    one = [records[number] for number in place]
    (alone,), (joined,) = (explain(one, VOCABULARY, LEXICON, TermsConfig(joints=joints)) for joints in (False, True))
    assert written(joined).startswith("numbers after colours")
    assert not any(term.what and term.where for term in alone)


@pytest.mark.parametrize(
    "options", [TermsConfig(), TermsConfig(5, named_only=False), TermsConfig(4, named_only=False, joints=True)]
)
def test_what_is_found_for_a_neuron_does_not_depend_on_those_beside_it(records, monkeypatch, options):
    alone = [texts_of(explain([one], VOCABULARY, LEXICON, options))[0] for one in records]
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (1, 1, 0)):
        for at_once in (1, 2, 16):
            monkeypatch.setattr(fit, "AT_ONCE", at_once)
            fresh = Lexicon(load_language())
            found = explain([records[place] for place in order], VOCABULARY, fresh, options)
            assert texts_of(found) == [alone[place] for place in order]


def test_weights_are_the_same_to_the_last_bit_beside_any_other_neurons(records):
    def search(chosen):
        samples = [selected(one, EVERY) for one in chosen]
        texts = Texts.of([one.window for sample in samples for one in sample], VOCABULARY)
        data = fit._Data.of(samples)
        found = fit._Search(data, fit._Candidates(data, tuple(Features(texts, LEXICON).blocks(True))))
        for _ in range(3):
            found.add(None)
        return found._weights

    together = search(records)
    for place, one in enumerate(records):
        assert search([one])[0].tobytes() == together[place].tobytes()


def test_one_and_two_threads_find_the_same():
    one, two = processes.on_threads("import test_terms_fit as t; print(t.all_texts())", 1, 2)
    assert one == two and "(+10)" in one


def all_texts():
    made = [record(activations_of(text, seed=number), number) for number, text in enumerate(RULES.values())]
    return texts_of(explain(made, VOCABULARY, LEXICON, TermsConfig(4, named_only=False, joints=True)))


def test_the_terms_are_those_of_plain_forward_selection(records):
    """The formulas of the module, on a dense matrix of all candidates of one neuron."""
    for one in records:
        sample = selected(one, EVERY)
        texts = Texts.of([part.window for part in sample], VOCABULARY)
        features = Features(texts, LEXICON)
        blocks = list(features.blocks(named_only=True))
        parts = [part for block in blocks for part in block.terms]
        x = np.concatenate([block.values(range(len(block.terms))) for block in blocks], 1)
        w = np.concatenate([part.weights for part in sample])
        w = w / w.sum()
        y = np.concatenate([part.window.activations for part in sample]).astype(np.float64)
        y = y - w @ y
        support, variance = (w > 0) @ x**2, w @ x**2 - (w @ x) ** 2
        chosen, residual = [], y
        for _ in range(3):
            cov = np.abs((w * residual) @ x)
            usable = (support >= 6) & (variance > 1e-9)
            score = np.where(usable, cov / np.sqrt(np.where(usable, variance, 1)), 0) * np.sqrt(support / (support + 8))
            score[chosen] = 0
            chosen.append(int(np.flatnonzero(score >= score.max() * (1 - 1e-9))[0]))
            a = x[:, chosen] - w @ x[:, chosen]
            gram = (a * w[:, None]).T @ a
            beta = np.linalg.solve(gram + np.diag(np.diag(gram) * 2 / support[chosen]), (a * w[:, None]).T @ y)
            residual = y - a @ beta
        expected = {
            parts[place]: round(weight / np.abs(beta).max() * 10) for place, weight in zip(chosen, beta, strict=True)
        }
        (found,) = explain([one], VOCABULARY, LEXICON, TermsConfig())
        assert {(term.what, term.where): term.weight for term in found} == {k: v for k, v in expected.items() if v}


def test_the_text_alone_predicts_what_was_fitted(records):
    sample = selected(records[0], EVERY)
    windows = [one.window for one in sample]
    (found,) = explain([records[0]], VOCABULARY, LEXICON, TermsConfig(5, named_only=False, joints=True))
    features = Features(Texts.of(windows, VOCABULARY), LEXICON)
    said = np.concatenate(TermsSimulator(VOCABULARY, LEXICON)(written(found), windows))
    np.testing.assert_array_equal(said, predict(found, features))
    np.testing.assert_array_equal(said, predict(read(written(found), LEXICON.language), features))


# Which tokens are looked at.


def tokens_of(windows):
    return {(one.excerpt, one.start + place) for one in windows for place in range(len(one.tokens))}


def looked_at(sample):
    return {
        (one.window.excerpt, one.window.start + int(place)) for one in sample for place in np.flatnonzero(one.weights)
    }


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_no_protocol_shows_or_scores_a_token_that_terms_are_chosen_on(records, protocol):
    for one in records:
        used = tokens_of([*protocol.set.windows(one), *protocol.windows(one)])
        assert looked_at(selected(one, EVERY)).isdisjoint(used)


def test_the_windows_of_these_tests_do_share_tokens_with_scored_ones(records):
    sample = selected(records[0], EVERY)
    assert any((one.weights == 0).any() and one.weights.any() for one in sample)


def test_windows_that_a_new_protocol_uses_are_not_looked_at(records):
    for pick in (Pick("by_quantile", None), Pick("top", None)):
        new = Protocol("new", ExplanationSet("new", ()), (pick,), ("pearson",), "nobody")
        used = tokens_of(new.windows(records[0]))
        assert looked_at(selected(records[0], (*EVERY, new))).isdisjoint(used)
    every = [
        Protocol("new", ExplanationSet("new", ()), (Pick(name, None),), ("pearson",), "nobody")
        for name in ("top", "by_quantile")
    ]
    assert not looked_at(selected(records[0], every))


def test_the_more_protocols_are_spared_the_fewer_tokens_are_looked_at(records):
    few = [PROTOCOLS[name] for name in ("uniform", "top-and-random")]
    assert looked_at(selected(records[0], EVERY)) < looked_at(selected(records[0], few))


def test_what_a_neuron_does_on_scored_tokens_changes_nothing(records):
    one = records[3]
    used = set().union(*(tokens_of([*p.set.windows(one), *p.windows(one)]) for p in PROTOCOLS.values()))

    def spoilt(window):
        places = [(window.excerpt, window.start + place) in used for place in range(len(window.tokens))]
        return replace(window, activations=np.where(places, 99, window.activations).astype(np.float32))

    changed = replace(
        one,
        top=tuple(map(spoilt, one.top)),
        random=tuple(map(spoilt, one.random)),
        by_quantile=tuple(replace(s, windows=tuple(map(spoilt, s.windows))) for s in one.by_quantile),
    )
    found = [texts_of(explain([each], VOCABULARY, LEXICON, TermsConfig())) for each in (one, changed)]
    assert found[0] == found[1]


def test_a_peak_weighs_as_much_as_its_stratum_and_the_rest_of_a_window_is_as_good_as_uniform(records):
    sample = selected(records[0], ())
    by_stratum = [sample[start : start + 10] for start in range(0, 50, 10)]
    peaks = [stratum[0].weights[stratum[0].window.peak] for stratum in by_stratum]
    assert peaks == pytest.approx([1, 1, 0.45, 0.045, 0.005])
    assert all(np.delete(one.weights, one.window.peak).tolist() == [1.0] * 63 for one in sample[:50])
    assert len(sample) == 100


# Neurons that cannot be explained.


def test_dead_neurons_and_records_that_are_too_small_are_named_skips(records):
    dead = replace(records[0], density=0.0)
    few = replace(
        records[0], by_quantile=tuple(replace(s, windows=s.windows[:0]) for s in records[0].by_quantile), top=()
    )
    silent = record(np.zeros((EXCERPTS, LENGTH), np.float32))
    constant = replace(silent, density=1.0)
    found = explain([dead, records[0], few, constant], VOCABULARY, LEXICON, TermsConfig())
    assert [one.reason for one in found if isinstance(one, Skipped)] == [DEAD, TOO_FEW, NOTHING]
    assert found[1] == explain([records[0]], VOCABULARY, LEXICON, TermsConfig())[0]


def test_a_record_without_windows_by_quantile_is_told_in_one_line(records):
    for strata in ((), records[0].by_quantile[:3]):
        with pytest.raises(UserError, match="layer 0 neuron 0 of model: records have (no|3) samples") as caught:
            explain([replace(records[0], by_quantile=strata)], VOCABULARY, LEXICON, TermsConfig())
        assert "\n" not in str(caught.value)


def test_records_without_windows_by_rank_and_level_will_do(records):
    bare = replace(records[0], by_rank=(), by_level=())
    assert texts_of(explain([bare], VOCABULARY, LEXICON, TermsConfig()))[0].startswith("numbers")


def test_activations_of_any_scale_give_the_same_terms():
    values = activations_of(RULES["pieces"])
    found = [
        texts_of(explain([record(values * scale)], VOCABULARY, LEXICON, TermsConfig()))
        for scale in (1, 2.0**60, 2.0**-60)
    ]
    assert found[0] == found[1] == found[2]


def test_what_decides_an_explanation_is_in_its_identity():
    language = load_language()
    identities = [identity(config, language) for config in (TermsConfig(), TermsConfig(4), TermsConfig(joints=True))]
    assert len({str(one) for one in identities}) == 3
    assert identities[0] | language.identity == identities[0]
