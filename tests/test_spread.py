"""Workers: fixed batches, shared out; and as Ray tasks (slow: pip install 'cratescope[ray]')."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope import cli
from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig
from cratescope.neurons.config import CollectConfig
from cratescope.workers import run_on_ray, share


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 5))
def test_workers_do_whole_batches_and_everything_once(n: int, batch: int, workers: int) -> None:
    """For any number of items, batch size and workers."""
    items = list(range(n))
    batches = {tuple(items[start : start + batch]) for start in range(0, n, batch)}
    shares = [share(items, f"{worker}/{workers}", batch) for worker in range(workers)]
    assert sorted(item for one in shares for item in one) == items
    assert {tuple(one[start : start + batch]) for one in shares for start in range(0, len(one), batch)} == batches


@pytest.mark.parametrize("worker", ["3/3", "0", "a/2", "-1/2", "0/0"])
def test_a_worker_that_cannot_be_is_refused(worker: str) -> None:
    with pytest.raises(UserError, match=f"--worker {worker}: has to be i/n"):
        share([1], worker, 1)


def test_a_stage_with_workers_may_run_under_torchrun_and_another_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        cli.run(["score", "nowhere"])
    with pytest.raises(UserError, match="not a run directory"):
        cli.run(["explain", "nowhere"])
    assert share([0, 1, 2], "auto", 1) == [0, 2]


def remember(config: CollectConfig) -> str:
    (config.run / config.worker.replace("/", "-")).touch()
    if config.worker == "1/2" and config.site == "codes":
        raise UserError("no such site")
    return "done"


@pytest.mark.slow
def test_ray_tasks_are_the_workers_and_what_they_refuse_is_told(tmp_path: Path) -> None:
    # The tests are no package that a worker process could import.
    pytest.importorskip("ray.cloudpickle").register_pickle_by_value(sys.modules[__name__])
    assert run_on_ray(remember, ExplainConfig(tmp_path, ray=2)) == "done"
    assert {path.name for path in tmp_path.iterdir()} == {"0-2", "1-2", "0-1"}
    with pytest.raises(UserError, match="^no such site$"):
        run_on_ray(remember, CollectConfig(tmp_path, site="codes", ray=2))
