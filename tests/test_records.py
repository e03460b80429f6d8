"""Records, explanations, simulations and scores survive their files, keyed by neuron."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cratescope.errors import UserError
from cratescope.explain import explained
from cratescope.explain.controls import OWN
from cratescope.explain.explained import Explanation, Judgement, Simulation
from cratescope.neurons import sample
from cratescope.neurons.records import (
    Histogram,
    Moments,
    NeuronId,
    NeuronRecord,
    Stratum,
    TokenMean,
    Window,
    bytes_per_row,
    layer_file,
    read_columns,
    read_records,
    write_records,
)
from cratescope.score import scores as scored
from cratescope.score.scores import Score
from kept_files import read_scores


def record(excerpt, start, width=4):
    return Window(np.arange(width), np.linspace(0, 1, width, dtype=np.float32), excerpt, start, 1)


def neuron(index, top=(), random=(), density=0.5, **more):
    moments = Moments(100, 0.1, 0.2, None, 3.0, 1.5)
    return NeuronRecord(NeuronId("m", "codes", 0, index), tuple(top), tuple(random), moments, density, **more)


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "layer-00.parquet"
    write_records(path, [neuron(3, [record(0, 5)], [record(1, 0), record(2, 7)]), neuron(1, density=0.0)])
    back = read_records(path)
    assert list(back) == [3, 1]
    assert back[3].neuron == NeuronId("m", "codes", 0, 3) and back[3].moments == neuron(3).moments
    assert [r.key for r in back[3].random] == [(1, 0, 4), (2, 7, 4)]
    assert np.array_equal(back[3].top[0].tokens, np.arange(4))
    assert np.array_equal(back[3].top[0].activations, np.linspace(0, 1, 4, dtype=np.float32))
    assert back[1].dead and not back[3].dead
    assert list(read_records(path, [1])) == [1]


def test_strata_histogram_and_token_means_come_back_as_they_were_written(tmp_path):
    strata = (Stratum(0.0, 0.5, (record(0, 5),)), Stratum(0.5, 1.5, ()))
    levels = (Stratum(0.1, 0.2, (record(1, 0, 2), record(2, 0, 2))),)
    histogram = Histogram(np.array([-0.5, 0.0]), np.array([0.0, 0.25]), np.array([3, 97]))
    tokens = (TokenMean(7, 0.5, 12), TokenMean(3, 0.25, 5))
    full = neuron(0, by_quantile=strata, by_level=levels, histogram=histogram, top_tokens=tokens)
    write_records(tmp_path / "layer-00.parquet", [full, neuron(1)])
    back = read_records(tmp_path / "layer-00.parquet")
    assert [(s.low, s.high, len(s.windows)) for s in back[0].by_quantile] == [(0.0, 0.5, 1), (0.5, 1.5, 0)]
    assert [w.key for w in back[0].by_level[0].windows] == [(1, 0, 2), (2, 0, 2)] and back[0].by_rank == ()
    assert back[0].histogram.count.tolist() == [3, 97] and back[0].histogram.low.tolist() == [-0.5, 0.0]
    assert back[0].top_tokens == tokens and back[0].bottom_tokens == ()
    assert back[1].by_quantile == () and back[1].histogram is None
    short = read_records(tmp_path / "layer-00.parquet", strata=())[0]
    assert short.by_quantile == () == short.by_level and short.top_tokens == tokens
    assert [w.key for w in short.random] == [w.key for w in back[0].random]


def test_raw_central_moments_are_the_standardised_ones_times_powers_of_the_deviation():
    moments = Moments(10, 0.0, 4.0, 0.5, 3.0, 9.0)
    assert (moments.third, moments.fourth) == (4.0, 48.0)
    assert Moments(10, 0.0, 0.0, None, None, 0.0).third == 0.0


@pytest.mark.parametrize(("peak", "start", "tokens"), [(32, 28, 8), (1, 0, 8), (62, 56, 8)])
def test_a_short_window_is_cut_around_the_peak_and_inside_the_long_one(peak, start, tokens):
    long = Window(np.arange(64), np.arange(64, dtype=np.float32), 3, 100, peak)
    short = long.cut(8)
    assert len(short.tokens) == tokens and short.start == 100 + start
    assert short.tokens[short.peak] == peak and short.excerpt == 3
    assert len(short.cut(99).tokens) == 8


def test_records_of_an_older_version_are_named(tmp_path):
    path = tmp_path / "layer-00.parquet"
    pq.write_table(pa.table({"index": [0], "top": [[]]}), path)
    with pytest.raises(UserError, match="made by an older version"):
        read_records(path)


def test_a_damaged_records_file_is_named(tmp_path):
    path = tmp_path / "layer-00.parquet"
    write_records(path, [neuron(0, [record(0, 5)])])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"layer-00\.parquet: damaged"):
        read_records(path)


def test_explanations_simulations_judgements_and_scores_come_back_by_neuron(tmp_path):
    ids = [NeuronId("m", "codes", layer, index) for layer, index in ((1, 4), (0, 10), (0, 2))]
    texts, expected = {OWN: "a", "empty": "b"}, {OWN: ((0.5, 1.0),), "empty": ((0.0, 0.0),)}
    made = {
        explained.explanations: [
            Explanation(one, f"text\n {one.index} é\0", "llm", "p", "why" * one.layer) for one in ids
        ],
        explained.simulations: [
            Simulation(ids[0], "sim", texts, ((0, 3, 2),), expected),
            Simulation(ids[1], "sim", texts, ((0, 3, 2),), {OWN: ((0.1, -3e-300),)}, "a slot without a value"),
            Simulation(ids[2], "sim", {}, (), {}, "dead neuron"),
        ],
        explained.judgements: [
            [Judgement(one, "fuzzing", control, "a", (0.25, 1.0), (True, False)) for control in (OWN, "shuffled")]
            for one in ids[:2]
        ]
        + [[Judgement(ids[2], "fuzzing", OWN, "", (), (), "dead neuron")]],
        scored.scores: [
            [
                Score(one, "random-only", "top", OWN, name, None if one.index == 2 else 0.1, 8, low, None, "x")
                for name, low in (("pearson", None), ("spearman", 0.5))
            ]
            for one in ids
        ],
    }
    for open_kept, items in made.items():
        opened = open_kept(tmp_path / open_kept.__name__)
        opened.write(items)
        assert dict(opened.all()) == dict(zip(ids, items, strict=True))
        assert [neuron for neuron, _ in opened.all()] == sorted(ids)
        assert opened.read(0, [10, 7]) == {10: items[1]} and opened.done(0) == {2, 10} and opened.layers == [0, 1]
    every = read_scores(tmp_path / "scores")
    assert every == [
        score for items in sorted(made[scored.scores], key=lambda items: items[0].neuron) for score in items
    ]


def test_windows_overlap_only_when_they_share_a_token():
    assert record(0, 5).overlaps(record(0, 8)) and record(0, 8).overlaps(record(0, 5))
    assert not record(0, 5).overlaps(record(0, 9)) and not record(0, 5).overlaps(record(1, 5))


def test_neurons_from_all_over_a_file_are_read_as_many_at_a_time_as_fit(tmp_path, monkeypatch):
    path = layer_file(tmp_path, 0)
    write_records(path, [neuron(index, [record(index, 5)], [record(index, 20)]) for index in range(40)])
    drawn = np.random.default_rng(0).permutation(40).tolist()
    chunks, reads = [drawn[start : start + 3] for start in range(0, 40, 3)], []
    monkeypatch.setattr(sample, "read_columns", lambda *given: reads.append(given) or read_columns(*given))
    for held, times in ((1 << 29, 1), (20 * bytes_per_row(path), 2), (1, 7)):
        monkeypatch.setattr(sample, "HELD", held)
        reads.clear()
        found = list(sample.with_records(path, iter(chunks), 2))
        assert [chunk for chunk, _ in found] == chunks and len(reads) == times
        for chunk, records in found:
            assert {index: records[index].neuron.index for index in chunk} == {index: index for index in chunk}
