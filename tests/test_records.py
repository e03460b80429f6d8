"""Records, explanations, simulations and scores survive their files, keyed by neuron."""

from __future__ import annotations

import numpy as np
import pytest

from cratescope.neurons.records import (
    ActivationRecord,
    Explanation,
    Moments,
    NeuronId,
    NeuronRecord,
    Protocol,
    Score,
    Simulation,
    read_explanations,
    read_records,
    read_scores,
    read_simulations,
    write_explanation,
    write_records,
    write_scores,
    write_simulation,
)
from cratescope.run import UserError


def record(excerpt, start, width=4):
    return ActivationRecord(np.arange(width), np.linspace(0, 1, width, dtype=np.float32), excerpt, start, 1)


def neuron(index, top=(), random=(), density=0.5):
    moments = Moments(100, 0.1, 0.2, None, 3.0, 1.5)
    return NeuronRecord(NeuronId("m", "codes", 0, index), tuple(top), tuple(random), moments, density)


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "layer-00.parquet"
    write_records(path, [neuron(3, [record(0, 5)], [record(1, 0), record(2, 7)]), neuron(1, density=0.0)])
    back = read_records(path)
    assert list(back) == [3, 1]
    assert back[3].neuron == NeuronId("m", "codes", 0, 3) and back[3].moments == neuron(3).moments
    assert [r.key for r in back[3].random] == [(1, 0), (2, 7)]
    assert np.array_equal(back[3].top[0].tokens, np.arange(4))
    assert np.array_equal(back[3].top[0].activations, np.linspace(0, 1, 4, dtype=np.float32))
    assert back[1].dead and not back[3].dead
    assert list(read_records(path, [1])) == [1]


def test_a_damaged_records_file_is_named(tmp_path):
    path = tmp_path / "layer-00.parquet"
    write_records(path, [neuron(0, [record(0, 5)])])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"layer-00\.parquet: damaged"):
        read_records(path)


def test_explanations_simulations_and_scores_come_back_by_neuron(tmp_path):
    ids = [NeuronId("m", "codes", layer, index) for layer, index in ((1, 4), (0, 10), (0, 2))]
    for one in ids:
        write_explanation(tmp_path / "e", Explanation(one, f"text {one.index}", "llm", "p"))
        write_simulation(tmp_path / "s", Simulation(one, "sim", "a", "b", ((0, 3),), ((0.5, 1.0),), ((0.0, 0.0),)))
    assert list(read_explanations(tmp_path / "e")) == sorted(ids)
    assert read_simulations(tmp_path / "s")[ids[0]].expected == ((0.5, 1.0),)
    scores = [Score(one, "random-only", "none", None if one.index == 2 else 0.5, 8) for one in ids]
    write_scores(tmp_path / "scores.jsonl", scores)
    assert read_scores(tmp_path / "scores.jsonl") == sorted(scores, key=lambda score: score.neuron)
    assert "NaN" not in (tmp_path / "scores.jsonl").read_text()


def test_a_protocol_cannot_explain_and_score_with_one_record():
    with pytest.raises(ValueError, match="would both explain and score"):
        Protocol("bad", explain_top=(0, 1), score_top=(1, 2), score_random=())


def test_windows_overlap_only_when_they_share_a_token():
    assert record(0, 5).overlaps(record(0, 8)) and record(0, 8).overlaps(record(0, 5))
    assert not record(0, 5).overlaps(record(0, 9)) and not record(0, 5).overlaps(record(1, 5))
