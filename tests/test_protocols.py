"""Protocols: what they pick, and that nothing is both explained from and scored on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.errors import UserError
from cratescope.explain.protocols import (
    PROTOCOLS,
    TOP,
    ExplanationSet,
    Pick,
    Protocol,
    protocols_named,
    scoring_windows,
)
from cratescope.explain.terms.selection import selection_windows
from cratescope.neurons.records import Moments, NeuronId, NeuronRecord, Stratum, Window

# What each protocol takes of a record that has everything: (list, ranks, width), by its source (docs/evaluation.md).
PICKED = {
    "top-and-random": (
        [("top", (0, 2, 4, 6, 8), 64)],
        [("random", (0, 2, 4, 6, 8), 64), ("top", (1, 3, 5, 7, 9), 64)],
    ),
    "random-only": ([("top", (0, 2, 4, 6, 8), 64)], [("random", (0, 2, 4, 6, 8), 64)]),
    "uniform": ([("top", (0, 2, 4, 6, 8), 64)], [("random", tuple(range(50)), 64)]),
    "anthropic": (
        [("top", tuple(range(15)), 8), ("by_rank", (0, 1), 8), ("random", tuple(range(5)), 8)],
        [
            ("top", tuple(range(15, 25)), 8),
            ("by_rank", (2, 3), 8),
            ("random", tuple(range(5, 10)), 8),
            ("top", tuple(range(25, 35)), 3),
        ],
    ),
    "bricken": (
        [("top", tuple(range(10)), 8), ("by_level", (0, 1), 8), ("random", tuple(range(5)), 8)],
        [
            ("top", tuple(range(10, 16)), 8),
            ("by_level", (2, 3), 8),
            ("random", tuple(range(5, 15)), 8),
            ("top", tuple(range(16, 38)), 3),
        ],
    ),
    "openai": (
        [("top", (0, 4, 8, 12, 16), 64)],
        [("top", (2, 6, 10, 14, 18), 64), ("random", (1, 4, 7, 10, 13), 64)],
    ),
}


def window(place: int, width: int = 64, excerpts: int = 10_000, peak: int | None = None) -> Window:
    """A window of its own among all others: `place` says where in the text."""
    tokens, activations = np.arange(width), np.ones(width, dtype=np.float32)
    return Window(tokens, activations, place % excerpts, place // excerpts * 64, width // 2 if peak is None else peak)


def whole_record(n_top: int = 50, n_random: int = 50, per_stratum: int = 20, peak: int | None = None) -> NeuronRecord:
    """A record with every list; no two windows of `top`, `random` and one stratification share a token."""

    def strata(kind: int, n: int, width: int) -> tuple[Stratum, ...]:
        return tuple(
            Stratum(0, 1, tuple(window(1000 * kind + 100 * part + place, width) for place in range(per_stratum)))
            for part in range(n)
        )

    return NeuronRecord(
        NeuronId("m", "s", 0, 0),
        tuple(window(place, peak=peak) for place in range(n_top)),
        tuple(window(500 + place, peak=peak) for place in range(n_random)),
        Moments(1, 0.0, 0.0, None, None, 1.0),
        0.5,
        by_quantile=strata(1, 5, 64),
        by_rank=strata(3, 11, 8),
        by_level=strata(5, 11, 8),
    )


def picked(record: NeuronRecord, picks: list[tuple[str, tuple[int, ...], int]]) -> list[tuple[int, int, int]]:
    """Keys of the windows, read off the record by hand."""
    keys = []
    for source, ranks, width in picks:
        lists = (
            [getattr(record, source)] if source in ("top", "random") else [s.windows for s in getattr(record, source)]
        )
        for windows in lists:
            for rank in ranks:
                whole = windows[rank]
                first = whole.start + len(whole.tokens) // 2 - width // 2
                keys.append((whole.excerpt, first, width))
    return keys


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_protocol_takes_what_its_source_says(name: str) -> None:
    record = whole_record()
    explain, score = PICKED[name]
    assert [item.key for item in PROTOCOLS[name].set.windows(record)] == picked(record, explain)
    assert [item.key for item in PROTOCOLS[name].windows(record)] == picked(record, score)


def test_the_numbers_of_windows_are_those_of_the_papers() -> None:
    counts = {
        name: (len(protocol.set.windows(whole_record())), len(protocol.windows(whole_record())))
        for name, protocol in PROTOCOLS.items()
    }
    assert counts == {
        "top-and-random": (5, 10),
        "random-only": (5, 5),
        "uniform": (5, 50),
        "anthropic": (15 + 2 * 11 + 5, 10 + 2 * 11 + 5 + 10),
        "bricken": (10 + 2 * 11 + 5, 60),
        "openai": (5, 10),
    }


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(PROTOCOLS)),
    *(st.integers(0, n) for n in (60, 60, 25)),
    st.one_of(st.none(), st.integers(0, 63)),
)
def test_no_token_is_both_explained_from_and_scored_on(
    name: str, n_top: int, n_random: int, per_stratum: int, peak: int | None
) -> None:
    record = whole_record(n_top, n_random, per_stratum, peak)
    protocol = PROTOCOLS[name]
    explained = {(w.excerpt, w.start + i) for w in protocol.set.windows(record) for i in range(len(w.tokens))}
    scored = [(w.excerpt, w.start + i) for w in protocol.windows(record) for i in range(len(w.tokens))]
    assert explained.isdisjoint(scored)
    assert len(set(scored)) == len(scored)


def test_out_of_context_is_the_peak_and_one_token_on_either_side() -> None:
    (whole,) = Pick("top", (0,)).windows(whole_record())
    (eight,) = Pick("top", (0,), 8).windows(whole_record())
    (three,) = Pick("top", (0,), 3).windows(whole_record())
    assert three.tokens.tolist() == eight.tokens[3:6].tolist()
    assert three.tokens[three.peak] == whole.tokens[whole.peak]


def test_two_explanation_sets_of_one_name_are_one_set() -> None:
    """Else explanations made from other windows would be kept in the same folder."""
    sets = {protocol.set for protocol in PROTOCOLS.values()}
    assert len(sets) == len({chosen.name for chosen in sets})
    assert list(protocols_named(list(PROTOCOLS))) == list(dict.fromkeys(item.set for item in PROTOCOLS.values()))


def test_protocols_of_one_explanation_set_are_found_by_it() -> None:
    chosen = protocols_named(["uniform", "openai", "random-only"])
    assert {found.name: [item.name for item in protocols] for found, protocols in chosen.items()} == {
        "top": ["uniform", "random-only"],
        "openai": ["openai"],
    }
    assert [item.name for item in TOP.protocols] == ["top-and-random", "random-only", "uniform"]


def test_a_protocol_that_would_score_what_it_explains_is_refused() -> None:
    own = PROTOCOLS["openai"]
    for clash in (Pick("top", None), Pick("top", (16,), 3)):
        with pytest.raises(ValueError, match="both explain and score"):
            dataclasses.replace(own, picks=(clash,))
    other = ExplanationSet("x", (Pick("top", (0,)),))
    assert Protocol("x", other, (Pick("top", (1,)), Pick("random", (0,))), ("pearson",), "").set == other


def test_every_scoring_window_is_simulated_once() -> None:
    record = whole_record()
    both = [PROTOCOLS["top-and-random"], PROTOCOLS["uniform"]]
    keys = [item.key for item in scoring_windows(both, record)]
    assert len(keys) == len(set(keys)) == 55


def test_an_unknown_protocol_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match="--protocols nonsense: not a protocol; choose from top-and-random"):
        protocols_named(["anthropic", "nonsense"])
    with pytest.raises(UserError, match="choose from"):
        protocols_named([])


def test_records_without_the_windows_a_protocol_needs_say_how_to_get_them() -> None:
    bare = dataclasses.replace(whole_record(), by_rank=(), by_level=())
    for name in ("anthropic", "bricken"):
        with pytest.raises(UserError, match="collect"):
            PROTOCOLS[name].set.windows(bare)
    assert PROTOCOLS["openai"].set.windows(bare)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_further_windows_to_explain_from_are_neither_scored_nor_shown_before_nor_selected_on(name: str) -> None:
    record, chosen = whole_record(), PROTOCOLS[name].set
    used = {window.key for one in PROTOCOLS.values() if one.set == chosen for window in one.windows(record)}
    used |= {window.key for window in chosen.windows(record)}
    used |= {window.key for window in selection_windows(record, [*PROTOCOLS.values()])}
    most = {"top": 5, "openai": 5}.get(chosen.name, 0)
    for turn in range(1, most + 1):
        windows = {window.key for window in chosen.again(turn).windows(record)}
        assert len(windows) == len(chosen.windows(record))
        assert windows.isdisjoint(used)
        assert chosen.again(turn).protocols == chosen.protocols
        used |= windows
    assert chosen.again(0) is chosen
    with pytest.raises(UserError, match=rf"--windows {most + 1}: at most {most} for what {chosen.protocols[0].name}"):
        chosen.again(most + 1)
