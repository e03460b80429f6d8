"""The planted rules and the sweep of densities in benchmarks/."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import planted_density as density  # noqa: E402
import planted_rules as rules  # noqa: E402

TEXT = """<|endoftext|>LICENSE for such as Bob: the 12 users, part of Rome, 1990-95, are certainly not alone.
  Films were seen by patients and women like the body; previously (in March 4, 1999,) the station was moved by it.
  She can't quickly call get_name(x2b) which is <b@c.de> of a/section, a section and a section of medical codes A1b.
  """


def test_at_least_24_rules_have_a_source_and_a_name_of_their_own_and_fire() -> None:
    found = [*rules.LEXICAL, *rules.CONTEXTUAL]
    assert len(found) >= 24 and len({name for name, *_ in found}) == len({text for _, text, *_ in found}) == len(found)
    for name, text, pattern, source in found:
        assert re.search(pattern, TEXT, re.M), name
        assert re.search(r"et al\. 20\d\d", source) and not text.endswith(".")


@pytest.mark.parametrize(
    "name, fires",
    [
        ("codes", ["x2b", "A1b"]),
        ("range", ["95"]),
        ("day", ["4"]),
        ("passive", ["by"]),
        ("again", ["section"]),
        ("beginning", ["LICENSE for such"]),
        ("slash", ["section"]),
        ("call", ["get_name"]),
        ("indented", ["Films", "She"]),
        ("year comma", [","]),
    ],
)
def test_a_rule_fires_where_it_says(name: str, fires: list[str]) -> None:
    pattern = next(rule[2] for rule in (*rules.LEXICAL, *rules.CONTEXTUAL) if rule[0] == name)
    compiled = re.compile(pattern, re.M)
    group = "x" if "x" in compiled.groupindex else 0
    found = [match.group(group) for match in compiled.finditer(TEXT)]
    assert found == fires


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    chance = 1 / np.arange(10, 4010)
    return np.random.default_rng(0).choice(4000, (200, density.CONTEXT), p=chance / chance.sum())


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
def test_explanations_are_as_common_as_they_should_be(text: np.ndarray, share: float) -> None:
    frequency = np.bincount(text.reshape(-1)) / text.size
    rule, named = density.explanations(np.random.default_rng(1), frequency, share)
    common = {name: float(frequency[values > 0].sum()) for name, values in named.items()}
    wanted = {"right": 1, "unsure": 1, "one cause": 0.5, "another": 1, "a tenth": 0.1, "twice": 2, "ten times": 10}
    assert common == pytest.approx({name: wanted[name] * share for name in named}, rel=0.1)
    assert ("ten times" in named) == (share == 0.01)
    assert all((named[name] > 0)[rule].all() for name in named if name in ("twice", "ten times"))
    assert not (named["one cause"] > 0)[~rule].any() and not (named["a tenth"] > 0)[~rule].any()


def test_noise_elsewhere_takes_its_part_and_leaves_the_density() -> None:
    fires = np.arange(20_000) % 10 == 0
    found = density.activations(np.random.default_rng(0), fires, "elsewhere")
    assert (found > 0).mean() == pytest.approx(0.1, abs=0.01)
    assert density.correlation(found, fires) == pytest.approx((1 - density.UNEXPLAINED) * 0.98, abs=0.02)
    noisy = density.activations(np.random.default_rng(0), fires, "in proportion")
    assert density.correlation(noisy, fires) == pytest.approx(np.sqrt(1 - density.UNEXPLAINED) * 0.98, abs=0.02)


def test_candidates_know_right_from_wrong() -> None:
    rng = np.random.default_rng(0)
    number = rng.integers(0, 50, 4000)
    fires = (number < 5).astype(float)
    words = density.Words(number, number % 2 == 1)
    case = density.Case(fires, fires, words, (number, fires))
    right, wrong = density.scored(case, fires), density.scored(case, (number % 10 == 7).astype(float))
    assert set(right) == {*density.HOUSE, *density.CANDIDATES}
    for name in density.CANDIDATES:
        assert right[name] == pytest.approx(1.0, abs=0.01), name
        assert wrong[name] < 0.1, name


def test_drift_is_taken_between_the_usual_densities() -> None:
    assert density.drift({0.001: 0.0, 0.01: 0.5, 0.1: 0.7, 0.4: 0.6, 0.5: 0.0}) == pytest.approx(0.2)
    assert np.isnan(density.drift({0.5: 1.0}))
