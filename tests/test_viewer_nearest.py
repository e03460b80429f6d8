"""Nearest units and twins: what comparing every pair one by one gives, kept until something else is compared."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cratescope.neurons.directions import output_directions
from cratescope.neurons.sites import read_site, site_named
from cratescope.run import Run
from cratescope.viewer.data import Library
from cratescope.viewer.loaded import Models
from cratescope.viewer.nearest import Nearest, Pair, Side, _excerpts
from cratescope.viewer.pairs import BLOCK, KEPT, Best, compare, read_best, write_best
from cratescope.viewer.turns import Turns
from test_viewer_data import made
from viewer_server import Viewer, recorded, serving


def columns(x: Any) -> Any:
    return lambda units: x[:, units].astype(np.float32)


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=0)


def test_the_best_of_all_pairs_are_found_block_by_block() -> None:
    random = np.random.default_rng(0)
    x, y = (unit(random.standard_normal((20, n))) for n in (2 * BLOCK + 50, BLOCK + 7))
    shares: list[float] = []
    best, back = compare(columns(x), x.shape[1], columns(y), y.shape[1], False, 20, shares.append)
    likeness = x.T @ y
    for found, every in ((best, likeness), (back, likeness.T)):
        order = np.argsort(-every, 1)[:, :KEPT]
        assert np.allclose(found.value, np.take_along_axis(every, order, 1), atol=1e-6)
        assert (found.row == order).mean() > 0.999
    assert shares[-1] == 1 and best.n_tokens == 20


def test_no_unit_is_its_own_neighbour_and_constant_ones_have_none() -> None:
    random = np.random.default_rng(1)
    x = unit(random.standard_normal((8, 30)))
    x[:, 4] = 0
    best, back = compare(columns(x), 30, columns(x), 30, True, 0, lambda share: None)
    assert best is back and (best.row != np.arange(30)[:, None]).all()
    assert (best.row[4] == -1).all() and 4 not in best.row


def test_what_was_found_is_read_again_unless_it_is_of_something_else(tmp_path: Path) -> None:
    best = Best(np.zeros((3, KEPT), np.int32), np.ones((3, KEPT), np.float32), 64)
    path = tmp_path / "nearest" / "a.safetensors"
    write_best(path, best, {"model": "a"})
    found = read_best(path, {"model": "a"}, 3)
    assert found is not None and np.array_equal(found.value, best.value) and found.n_tokens == 64
    assert read_best(path, {"model": "b"}, 3) is None and read_best(path, {"model": "a"}, 4) is None
    path.write_bytes(path.read_bytes()[:40])
    assert read_best(path, {"model": "a"}, 3) is None and read_best(tmp_path / "none", {}, 3) is None


@pytest.fixture(scope="module")
def folder(runs_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = recorded(runs_folder, data_folder, tmp_path_factory.mktemp("nearest") / "runs")
    (folder.parent / data_folder.parent.name).symlink_to(data_folder.parent)  # where run.json says
    return folder


@pytest.fixture(scope="module")
def viewer(folder: Path) -> Iterator[Viewer]:
    with serving(folder / "crate", folder / "gpt2") as found:
        yield found


def nearest(viewer: Viewer, *address: Any) -> dict[str, Any]:
    for _ in range(600):
        found = viewer.get("card", *address).json["nearest"]
        if "computing" not in found:
            return found
        time.sleep(0.1)
    raise AssertionError("it takes too long")


@torch.no_grad()
def activations(run: Run, excerpts: Any) -> Any:
    model = run.load_model().eval()
    with read_site(model, site_named("auto", model), [0]) as found:
        model(torch.from_numpy(excerpts.astype(np.int64)))
    return found[0].flatten(0, 1).numpy().astype(np.float64)


def correlations(x: Any, y: Any) -> Any:
    x, y = (one - one.mean(0) for one in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x.T @ y) / np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))


def text_of(viewer: Viewer) -> Any:
    one, other = (viewer.api.library.opened[name] for name in ("crate", "gpt2"))
    pair = Pair("activation", Side(one, one.sites["codes"]), Side(other, other.sites["mlp"]))
    return _excerpts(one, pair.length, pair.tokens)


def test_neighbours_by_weights_have_the_highest_cosines_within_the_run(viewer: Viewer, folder: Path) -> None:
    found = nearest(viewer, "crate", "codes", 0, 7)["weights"]
    model = Run(folder / "crate").load_model().eval()
    directions = output_directions(model, site_named("auto", model), 0).double().numpy()
    cosines = directions @ directions[7] / np.linalg.norm(directions, axis=1) / np.linalg.norm(directions[7])
    cosines[7] = -1
    assert {one["run"] for one in found} == {"crate"} and len(found) == 10
    assert [one["value"] for one in found] == pytest.approx(np.sort(cosines)[::-1][:10].tolist(), abs=1e-3)
    assert found[0]["index"] == int(cosines.argmax())


def test_neighbours_by_activation_have_the_highest_correlations_within_and_across_runs(
    viewer: Viewer, folder: Path
) -> None:
    excerpts = text_of(viewer)
    crate, gpt2 = (activations(Run(folder / name), excerpts) for name in ("crate", "gpt2"))
    unit = int(np.argmax(crate.std(0)))
    found = nearest(viewer, "crate", "codes", 0, unit)
    across = [one for one in found["activation"] if one["site"] == "mlp"]
    wanted = np.nan_to_num(correlations(crate[:, [unit]], gpt2)[0], nan=-1)
    assert across[0]["run"] == "gpt2" and across[0]["index"] == int(wanted.argmax())
    assert across[0]["value"] == pytest.approx(float(wanted.max()), abs=2e-3)
    within = [one for one in found["activation"] if one["run"] == "crate"]
    own = np.nan_to_num(correlations(crate[:, [unit]], crate)[0], nan=-1)
    own[unit] = -1
    assert within[0]["value"] == pytest.approx(float(own.max()), abs=2e-3)
    assert found["n_tokens"] == excerpts.size


def test_twins_are_each_units_best_and_mutual_where_both_say_so(viewer: Viewer, folder: Path) -> None:
    found = viewer.get("twins", "crate", "codes", "gpt2", "mlp").json
    assert found["a"] == {"run": "crate", "site": "codes"} and found["n_tokens"] == text_of(viewer).size
    excerpts = text_of(viewer)
    every = correlations(*(activations(Run(folder / name), excerpts) for name in ("crate", "gpt2")))
    every = np.nan_to_num(every, nan=-1)
    values = [one["correlation"] for one in found["pairs"]]
    assert values == sorted(values)[::-1] and len(values) > 100
    for one in found["pairs"][:50]:
        row = every[one["index"]]
        assert one["correlation"] == pytest.approx(float(row.max()), abs=2e-3)
        if np.sort(row)[-1] - np.sort(row)[-2] > 5e-3:
            assert one["other_index"] == int(row.argmax())
    mutual = [one for one in found["pairs"] if one["back"]]
    assert mutual and all(
        every[one["index"], one["other_index"]] >= every[:, one["other_index"]].max() - 5e-3 for one in mutual
    )
    back = viewer.get("twins", "gpt2", "mlp", "crate", "codes").json["pairs"]
    turned = {(one["other_index"], one["index"]) for one in back if one["back"]}
    assert turned == {(one["index"], one["other_index"]) for one in mutual}


def test_features_of_a_sample_are_compared_by_their_own_index(viewer: Viewer) -> None:
    pairs = viewer.get("twins", "gpt2", "sae/small", "gpt2", "mlp").json["pairs"]
    recorded = {*viewer.get("table", "gpt2", "sae/small").json["index"]}
    assert {one["index"] for one in pairs} <= recorded and len(recorded) == 30


def test_it_is_kept_in_the_run_and_not_made_again(viewer: Viewer, folder: Path) -> None:
    nearest(viewer, "crate", "codes", 0, 1)
    kept = [*(folder / "crate" / "nearest").glob("*.safetensors")]
    assert kept
    library = Library([folder / "crate", folder / "gpt2"])

    def no_models() -> Models:
        raise AssertionError("it is computed again")

    again = Nearest(library.opened.values(), no_models, Turns())
    opened = library.opened["crate"]
    for _ in range(600):
        found = again.of(opened, opened.sites["codes"], 0, 1)
        if "computing" not in found:
            break
        time.sleep(0.05)
    assert found == nearest(viewer, "crate", "codes", 0, 1)


def test_what_cannot_be_compared_says_why(tmp_path: Path, folder: Path) -> None:
    made(tmp_path / "imported")
    with serving(tmp_path / "imported", folder / "crate") as viewer:
        assert "imported has no model" in viewer.get("card", "imported", "codes", 0, 1).json["nearest"]["error"]
        answer = viewer.get("twins", "crate", "codes", "imported", "codes")
        assert answer.status == 404 and "imported has no model" in answer.error


def test_without_its_text_a_run_has_no_neighbours_by_activation_and_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "crate", tmp_path / "far" / "away" / "crate", ignore=shutil.ignore_patterns("nearest"))
    with serving(tmp_path / "far" / "away" / "crate") as viewer:
        answer = viewer.get("twins", "crate", "codes", "crate", "codes")
        assert answer.status == 404 and "no such folder, where" in answer.error
        found = nearest(viewer, "crate", "codes", 0, 1)
        assert found["weights"] and not found["activation"]
