"""Every statistic of the streaming pass agrees with brute force over all activations, however the text is cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.errors import UserError
from cratescope.explain.protocols import PROTOCOLS
from cratescope.neurons import streaming
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.merge import LEAST_COUNT, TOKENS_LISTED, Totals, columns
from cratescope.neurons.records import QUANTILES, read_records, write_table
from cratescope.neurons.strata import FRACTION, LATER, Pilot, bin_edges, bins_of, cutoffs, draw
from cratescope.neurons.streaming import LayerStatistics, Plan, Pool

SMALL = {"context": 24, "window": 8, "top": 6, "random": 6, "tokens": 12}
KINDS = ("dense", "ties", "sparse", "negative", "offset")


def configuration(n, **changes):
    return CollectConfig("run", **(SMALL | {"excerpts": n} | changes))


def activations_of(kind, seed, n, t):
    """(n, t, 5): three neurons of a kind, one constant, one silent."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, t, 5))
    if kind == "ties":
        a = np.round(a)
    elif kind == "sparse":
        a = np.maximum(a - 1.5, 0) * 10.0 ** rng.integers(-3, 3)
    elif kind == "negative":
        a = -np.abs(a) + (rng.random(a.shape) < 0.2)
    elif kind == "offset":
        a = 1000 + 0.01 * a
    a[..., 3], a[..., 4] = 0.3, 0
    return a.astype(np.float32)


def text_of(n, t, seed=0):
    return np.random.default_rng([seed, 7]).integers(0, 16, size=(n, t)) ** 2


def plan_of(activations, config, text, n_pilot=2):
    pilot = Pilot.of(torch.from_numpy(activations[:n_pilot].reshape(-1, activations.shape[-1])))
    return Plan.of(config, 0, pilot, text)


def shards_of(plan, activations, text, shards, batch, workers=1):
    """The shards' tensors in order; worker w does shards w, w + workers, ..., with statistics of its own."""
    cuts = np.array_split(np.arange(len(activations)), shards)
    found = {}
    for worker in range(workers):
        statistics = LayerStatistics(plan)
        for number in range(worker, len(cuts), workers):
            for rows in (cuts[number][i : i + batch] for i in range(0, len(cuts[number]), batch)):
                statistics.update(torch.from_numpy(activations[rows]), torch.from_numpy(text[rows]), int(rows[0]))
            if len(cuts[number]):
                found[number] = statistics.take_shard(int(cuts[number][0]))
    return [found[number] for number in sorted(found)]


def records_of(activations, config, folder, shards=2, batch=3, workers=1, n_pilot=2):
    """Stream (n, t, h) activations and return the neurons' records as they are read from their file."""
    n, t, _ = activations.shape
    text = text_of(n, t)
    plan = plan_of(activations, config, text, n_pilot)
    totals = Totals.of(plan, shards_of(plan, activations, text, shards, batch, workers))
    path = folder / "layer-00.parquet"
    write_table(path, columns(plan, totals, text, {"model": "m", "site": "s", "layer": 0}))
    return list(read_records(path).values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("streaming")


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    n=st.integers(1, 12),
    t=st.integers(2, 40),
    per_excerpt=st.sampled_from([1, 3]),
)
def test_every_statistic_equals_brute_force(folder, kind, seed, n, t, per_excerpt):
    """Also with ties, constant, silent and negative neurons, excerpts shorter than a window, and one excerpt only."""
    activations, text, config = (
        activations_of(kind, seed, n, t),
        text_of(n, t),
        configuration(n, per_excerpt=per_excerpt),
    )
    near_zero = 2.0**-21 * np.abs(activations).max()
    for h, record in enumerate(records_of(activations, config, folder, shards=3, batch=2)):
        a = activations[..., h]
        assert_moments(record, a.astype(np.float64))
        assert_histogram(record.histogram, a.astype(np.float64), near_zero)
        assert_top(record, a, config)
        assert_token_means(record, a, text, config)
        assert_windows(record, a, text)
        assert_strata(record, np.sort(a.reshape(-1).astype(np.float64)), near_zero)


def assert_moments(record, a):
    moments, central = record.moments, a - a.mean()
    scale = np.abs(central).max() or 1.0
    assert moments.n_tokens == a.size and moments.maximum == a.max()
    assert record.density == np.count_nonzero(a) / a.size and record.dead == (not a.any())
    assert abs(moments.mean - a.mean()) <= 1e-6 * scale
    for power, found in ((2, moments.variance), (3, moments.third), (4, moments.fourth)):
        assert abs(found - (central**power).mean()) <= 2e-6 * scale**power
    if np.ptp(a) > 0:
        assert moments.skewness == pytest.approx((central**3).mean() / a.var() ** 1.5, abs=1e-4)
        assert moments.kurtosis == pytest.approx((central**4).mean() / a.var() ** 2, rel=1e-4)
    else:
        assert moments.variance == 0 and moments.skewness is None and moments.kurtosis is None


def assert_histogram(histogram, a, near_zero):
    """Each value lies in its bin but for rounding to half precision; no bin is wider than promised."""
    values, start = np.sort(a.reshape(-1)), 0
    assert histogram.count.sum() == a.size
    for low, high, count in zip(histogram.low, histogram.high, histogram.count, strict=True):
        inside = values[start : start + count]
        slack = 2.0**-11 * np.maximum(abs(low), abs(high)) + near_zero
        assert inside[0] >= low - slack and inside[-1] <= high + slack
        assert high - low <= max(min(abs(low), abs(high)) / 16, near_zero)
        start += count


def assert_top(record, a, config):
    """Greedily, the highest first, at most so many of an excerpt, no two sharing a token; ties by position."""
    n, t = a.shape
    width, picks = min(config.window, t), []
    starts = np.clip(np.arange(t) - width // 2, 0, t - width)
    for e in range(n):
        free = a[e].copy()
        for _ in range(config.per_excerpt):
            p = int(free.argmax())
            if free[p] > 0:
                picks.append((-free[p], e, p))
            free[np.abs(starts - starts[p]) < width] = -np.inf
    wanted = [(e, p) for _, e, p in sorted(picks)[: config.top]]
    assert [(r.excerpt, r.start + r.peak) for r in record.top] == wanted


def assert_token_means(record, a, text, config):
    ids, counts = np.unique(text, return_counts=True)
    kept = sorted(zip(-counts, ids, strict=True))[: config.tokens]
    means = {int(i): float(a[text == i].mean(dtype=np.float64)) for count, i in kept if -count >= LEAST_COUNT}
    near = 1e-5 * (1 + float(np.abs(a).max()))
    for listed, sign in ((record.top_tokens, -1), (record.bottom_tokens, 1)):
        order = [sign * token.mean for token in listed]
        assert order == sorted(order) and len(listed) == min(TOKENS_LISTED, len(means))
        assert order == pytest.approx(sorted(sign * mean for mean in means.values())[: len(listed)], abs=near)
        for token in listed:
            assert token.mean == pytest.approx(means[token.token], abs=near)
            assert token.count == (text == token.token).sum()


def assert_windows(record, a, text):
    """A window is a stretch of one excerpt; none shares a token with others of its width and purpose."""
    t = a.shape[1]
    long, short = list(record.top + record.random), [w.cut(min(8, t)) for w in record.top + record.random]
    for strata_of, base in ((record.by_quantile, long), (record.by_rank, short), (record.by_level, short)):
        used = set()
        for w in base + [w for stratum in strata_of for w in stratum.windows]:
            where = slice(w.start, w.start + len(w.tokens))
            assert w.start >= 0 and w.start + len(w.tokens) <= t and 0 <= w.peak < len(w.tokens)
            assert np.array_equal(w.tokens, text[w.excerpt, where])
            assert np.array_equal(w.activations, a[w.excerpt, where])
            places = {(w.excerpt, p) for p in range(w.start, w.start + len(w.tokens))}
            assert not places & used
            used |= places


def assert_strata(record, a, near_zero):
    """The bound: a token's value is within a bin of the exact quantiles of its stratum; levels are exact."""
    ranks = [k / 12 for k in range(12)]
    for strata_of, edges in ((record.by_quantile, QUANTILES), (record.by_rank, ranks)):
        for stratum, low, high in zip(strata_of, edges[:-1], edges[1:], strict=True):
            first = a[min(int(np.floor(low * a.size)), a.size - 1)]
            last = a[min(int(np.ceil(high * a.size)), a.size) - 1]
            for w in stratum.windows:
                value = float(w.activations[w.peak])
                assert value >= first - abs(first) / 15 - near_zero
                assert value <= last + abs(last) / 15 + near_zero
    assert len(record.by_level) == 11
    for k, stratum in enumerate(record.by_level, 1):
        for w in stratum.windows:
            assert stratum.low <= float(w.activations[w.peak]) <= stratum.high
            assert stratum.low == pytest.approx(k / 12 * a[-1])


@settings(deadline=None, max_examples=12)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000), workers=st.integers(1, 4), batch=st.integers(1, 5))
def test_workers_and_batches_change_no_bit(folder, kind, seed, workers, batch):
    activations = activations_of(kind, seed, 14, 20)
    path = folder / "layer-00.parquet"
    records_of(activations, configuration(14), folder, shards=5)
    before = path.read_bytes()
    records_of(activations, configuration(14), folder, shards=5, batch=batch, workers=workers)
    assert path.read_bytes() == before


def test_the_pilot_decides_nothing_but_how_much_is_kept(monkeypatch):
    """A pilot unlike the text gives exact moments and, where all is kept, the same strata."""
    activations = activations_of("dense", 3, 12, 24)
    activations[:2] = 0
    text = text_of(12, 24)
    bounds = []
    for n_pilot in (2, 12):
        plan = plan_of(activations, configuration(12), text, n_pilot)
        totals = Totals.of(plan, shards_of(plan, activations, text, 2, 3))
        table = columns(plan, totals, text, {"model": "m", "site": "s", "layer": 0})
        assert table["variance"][:3] == pytest.approx(activations[..., :3].var((0, 1), dtype=np.float64), rel=1e-6)
        bounds.append(np.array(table["by_rank"].flatten().field("low")[:33]))
    assert np.allclose(*bounds, rtol=1 / 8, atol=0.05)


def test_windows_of_a_stratum_are_a_uniform_draw(monkeypatch, folder):
    """Candidates are drawn, cut off in cells and added in the tail; what is left must not favour any rank."""
    monkeypatch.setattr(streaming, "ROWS", 500)
    n, t, h, seeds = 40, 100, 6, 10
    activations = np.repeat(np.random.default_rng(0).normal(size=(n, t, 1)), h, 2).astype(np.float32)
    rank = activations[..., 0].reshape(-1).argsort().argsort().reshape(n, t) / (n * t)
    means = {0: [], 2: [], 3: [], 4: []}
    for seed in range(seeds):
        config = configuration(n, window=1, top=1, random=0, seed=seed)
        records = records_of(activations, config, folder, batch=20, n_pilot=12)
        for stratum, record in ((s, r) for r in records for s in means):
            low, high = QUANTILES[stratum : stratum + 2]
            windows = record.by_quantile[stratum].windows
            means[stratum] += [np.mean([(rank[w.excerpt, w.start] - low) / (high - low) for w in windows])]
    for stratum, found in means.items():
        by_seed = np.array(found).reshape(seeds, h).mean(1)  # neurons of one seed share the drawn tokens
        exact = 0.5 if stratum < 4 else 0.25  # the highest of the four tokens is the top window's
        assert abs(by_seed.mean() - exact) < 4 * by_seed.std(ddof=1) / seeds**0.5 + 0.02, stratum


def test_cells_that_are_cut_off_hide_nothing_below_the_cutoff():
    """Against all tokens: of those in a range of places, every one up to the cutoff is in the pool."""
    rng = np.random.default_rng(1)
    n, t = 60, 50
    activations = np.maximum(rng.normal(size=(n, t, 3)), 0).astype(np.float32)
    text = text_of(n, t)
    plan = dataclasses.replace(
        plan_of(activations, configuration(n), text), rows=torch.from_numpy(np.sort(rng.permutation(n * t)[:600]))
    )
    pools = Totals.of(plan, shards_of(plan, activations, text, 3, 4)).pools[1:]
    position = torch.arange(n * t)
    flat = torch.from_numpy(activations).flatten(0, 1)
    drawn = torch.isin(position, plan.rows)
    for ladder, pool in zip(plan.ladders, pools, strict=True):
        found, bars = pool.windows(), pool.bar.view(3, -1)
        for h in range(3):
            priority, fraction = draw(plan.salt, torch.tensor(h), position)
            priority = torch.where(drawn, priority, priority + LATER)
            place = bins_of(flat[:, h] * plan.pilot.scale[h]).long() * FRACTION + fraction
            held = set(found["position"][found["group"] // ladder.n_cells == h].tolist())
            for low, high in ((0.2, 0.6), (0.9, 0.99), (0.995, 1.0)):
                edges = place.sort().values[[int(low * n * t), int(high * n * t) - 1]]
                cut = cutoffs(ladder, bars, *(edge.expand(3) for edge in edges))[h]
                inside = (place >= edges[0]) & (place < edges[1]) & (priority < cut)
                assert set(position[inside].tolist()) <= held
                assert inside.any()


def test_random_windows_are_uniform_over_the_text(folder):
    activations = np.zeros((50, 20, 400), dtype=np.float32)
    records = records_of(activations, configuration(50, window=1, random=10, strata=False), folder, batch=7)
    positions = np.array([r.excerpt * 20 + r.start for record in records for r in record.random])
    counts = np.histogram(positions, bins=10, range=(0, 1000))[0]
    assert len(positions) == 4000
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), protocol=st.sampled_from(sorted(PROTOCOLS)))
def test_no_token_both_explains_and_scores_a_neuron(folder, seed, protocol):
    activations = np.random.default_rng(seed).random((30, 16, 2), dtype=np.float32)
    record = records_of(activations, configuration(30, top=12), folder)[0]
    explain = {(w.excerpt, w.start + i) for w in PROTOCOLS[protocol].set.windows(record) for i in range(len(w.tokens))}
    scoring = {(w.excerpt, w.start + i) for w in PROTOCOLS[protocol].windows(record) for i in range(len(w.tokens))}
    assert explain and scoring and not explain & scoring


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_is_refused_with_its_place(value):
    activations = np.zeros((4, 5, 3), dtype=np.float32)
    plan = plan_of(activations, configuration(4), text_of(4, 5))
    activations[2, 3, 1] = value
    with pytest.raises(UserError, match=f"neuron 1 is {value} at excerpt 2, token 3"):
        shards_of(plan, activations, text_of(4, 5), 1, 4)


def test_activations_too_large_for_float32_powers_keep_their_moments(folder):
    activations = activations_of("dense", 0, 6, 20)
    activations[4, 7, 0] = 1e20
    a = activations[..., 0].astype(np.float64)
    moments = records_of(activations, configuration(6), folder)[0].moments
    assert moments.variance == pytest.approx(a.var(), rel=1e-6)
    assert moments.kurtosis == pytest.approx(((a - a.mean()) ** 4).mean() / a.var() ** 2, rel=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-1e6, max_value=1e6), min_size=2, max_size=30))
def test_bins_rise_with_the_value_and_hold_what_their_edges_say(values):
    values = np.sort(np.array(values, dtype=np.float32) + np.float32(0))  # no -0, which has a bin of its own
    bins = bins_of(torch.from_numpy(values)).numpy()
    assert (np.diff(bins) >= 0).all()
    edges = bin_edges()
    slack = np.abs(values) * 2.0**-11 + 2.0**-25
    assert (values >= edges[bins] - slack).all() and (values <= edges[bins + 1] + slack).all()


def test_a_pool_keeps_the_smallest_keys_and_of_equals_the_first():
    rng = np.random.default_rng(0)
    pool, offered = Pool(3, torch.full((5,), 100)), []
    for batch in range(20):
        group, key = rng.integers(0, 5, 30), rng.integers(0, 120, 30)
        order = np.arange(30) + 30 * batch
        possible = key < pool.bar.numpy()[group]
        offered += list(zip(group, key, order, strict=True))
        entries = {"group": group, "key": key, "n": order}
        pool.offer({name: torch.from_numpy(x[possible]) for name, x in entries.items()})
    found = pool.windows()
    wanted = [entry for g in range(5) for entry in sorted(e for e in offered if e[0] == g and e[1] < 100)[:3]]
    assert list(zip(*(found[name].tolist() for name in ("group", "key", "n")), strict=True)) == wanted
