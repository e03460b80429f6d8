"""The viewer's data: what pages show is what the files say, for every kind of run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cratescope.errors import UserError
from cratescope.explain.controls import OWN
from cratescope.files import read_json, write_json
from cratescope.neurons.records import layer_file, read_records, write_records
from cratescope.results.scores import Scores
from cratescope.run import Run
from cratescope.viewer.data import Library
from cratescope.viewer.search import Search
from cratescope.viewer.values import finite, number, numbers
from fake_run import Fake, fake_run, fake_tokenizer


def made(root: Path, **changes: Any) -> Run:
    run = fake_run(root, Fake(**changes))
    fake_tokenizer().save_pretrained(run.model)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("viewer")
    made(folder / "crate")
    made(folder / "crate-untrained", tokens_trained=0, quality=0.1)
    made(folder / "gpt2", family="gpt2")
    return folder


@pytest.fixture(scope="module")
def library(runs: Path) -> Library:
    return Library([runs / name for name in ("crate", "crate-untrained", "gpt2")])


def column(table: dict[str, Any], key: str) -> list[Any]:
    return next(one["values"] for one in table["columns"] if one["key"] == key)


def test_home_has_every_run_with_its_loss_its_layers_and_scores_beside_a_control(library: Library, runs: Path) -> None:
    home = library.home()
    crate, untrained, gpt2 = home["runs"]
    assert [one["name"] for one in home["runs"]] == ["crate", "crate-untrained", "gpt2"]
    assert (crate["title"], untrained["title"], gpt2["title"]) == ("CRATE 2l", "CRATE 2l, untrained", "GPT-2 2l")
    assert crate["loss"] == read_json(runs / "crate" / "evaluation.json")["loss"]
    [site] = crate["sites"]
    assert (site["name"], site["native"], site["width"]) == ("codes", True, 6)
    assert [(one["layer"], one["n"], one["dead"]) for one in site["layers"]] == [(0, 6, 1), (1, 6, 1)]
    [score] = site["layers"][0]["scores"]
    mean = Scores.read(runs / "crate" / "scores/codes/offline/list-pmi").mean("top-and-random", layer=0)
    assert score["mean"] == pytest.approx(mean.mean, rel=1e-4) and score["low"] == pytest.approx(mean.low, rel=1e-4)
    assert score["control"] == "shuffled" and score["control_mean"] is not None


def test_a_table_has_one_entry_per_unit_in_every_list_and_says_what_the_files_say(library: Library, runs: Path) -> None:
    table = library.table("crate", "codes")
    assert table["layer"] == [0] * 6 + [1] * 6 and table["index"] == [*range(6)] * 2
    assert all(len(one["values"]) == 12 for one in table["columns"]) and len(table["text"]) == 12
    records = read_records(layer_file(runs / "crate/records/codes", 1))
    assert column(table, "maximum")[6:] == [number(records[index].moments.maximum) for index in range(6)]
    scores = Scores.read(runs / "crate/scores/codes/offline/list-pmi")
    own = scores.columns("top-and-random")[1].values()
    assert column(table, "score")[6:] == [number(own[index]) if index in own else None for index in range(6)]
    other = scores.columns("top-and-random", control="shuffled")[1].values()
    assert column(table, "gain")[7] == pytest.approx(own[1] - other[1], rel=1e-3)
    assert column(table, "dead") == [False] * 5 + [True] + [False] * 5 + [True]
    assert table["text"][0] == "words about the law" and table["text"][5] == "" and not column(table, "explained")[5]


def test_a_card_has_windows_of_every_kind_scores_beside_controls_and_where_it_comes_from(library: Library) -> None:
    card = library.card("crate", "codes", 0, 1)
    assert {one["kind"] for one in card["windows"]} == {"top", "quantile", "random"}
    top = card["windows"][0]
    assert len(top["tokens"]) == len(top["activations"]) == 12 and top["label"] == "top 1" and top["peak"] == 6
    assert max(max(one["simulated"]) for one in card["windows"] if one["simulated"]) == 10
    [said] = card["explanations"]
    assert said["text"] == "months and dates" and {row["protocol"] for row in said["scores"]} == {
        "top-and-random",
        "random-only",
    }
    [score] = [row for row in said["scores"] if row["protocol"] == "top-and-random"]
    assert score["low"] <= score["value"] <= score["high"]
    assert [row["name"] for row in score["controls"]] == ["shuffled", "empty", "unigram", "untrained"]
    assert all(row["value"] is not None and row["title"] for row in score["controls"])
    assert sum(card["histogram"]["count"]) > 0 and card["quantiles"]["share"][-1] == 1
    assert card["life"] == [] and card["effects"] is None and card["problem"] is None
    assert {name for name, _ in card["about"]} >= {"run", "explained", "simulated"}


def test_a_dead_unit_has_no_score_and_the_reason(library: Library) -> None:
    card = library.card("crate", "codes", 0, 5)
    [said] = card["explanations"]
    assert card["numbers"]["dead"] and said["skipped"] == "dead neuron" and not said["text"]
    assert all(row["value"] is None and row["reason"] for row in said["scores"])


def test_everything_is_json_with_finite_numbers(library: Library) -> None:
    for value in (library.home(), library.table("gpt2", "mlp"), library.card("gpt2", "mlp", 1, 4)):
        json.dumps(value, allow_nan=False)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (("nobody", "codes", 0, 1), "no run 'nobody'; this viewer has crate, crate-untrained, gpt2"),
        (("../crate", "codes", 0, 1), "no run '../crate'"),
        (("crate", "mlp", 0, 1), "no site 'mlp' of crate; it has records of codes"),
        (("crate", "codes", 2, 1), "layer 2: no such layer of crate codes; it has layers 0, 1"),
        (("crate", "codes", 0, 6), "no neuron 6; this layer has neurons 0 to 5"),
    ],
)
def test_what_is_not_there_is_one_line(library: Library, address: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        library.card(*address)


def test_two_runs_of_one_name_are_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "crate", tmp_path / "crate")
    with pytest.raises(UserError, match="two run directories are called 'crate'; rename one"):
        Library([runs / "crate", tmp_path / "crate"])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        Library([tmp_path])


def test_a_run_without_explanations_or_scores_is_shown_all_the_same(tmp_path: Path) -> None:
    run = made(tmp_path / "bare")
    for name in ("explanations", "simulations", "scores", "evaluation.json"):
        path = run.root / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    library = Library([run.root])
    [entry] = library.home()["runs"]
    assert (
        entry["loss"] is None and entry["sites"][0]["measures"] == [] and not entry["sites"][0]["has"]["explanations"]
    )
    assert "score" not in {one["key"] for one in library.table("bare", "codes")["columns"]}
    card = library.card("bare", "codes", 0, 1)
    assert card["explanations"] == [] and card["windows"]


def test_a_run_without_records_is_on_the_home_page(tmp_path: Path) -> None:
    run = made(tmp_path / "early")
    shutil.rmtree(run.root / "records")
    library = Library([run.root])
    assert library.home()["runs"][0]["sites"] == []
    with pytest.raises(UserError, match="it has records of none"):
        library.table("early", "codes")


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_file_of_records_hides_its_layer_and_no_other_run(tmp_path: Path) -> None:
    broken, whole = made(tmp_path / "broken"), made(tmp_path / "whole")
    damage(layer_file(broken.records("codes"), 0))
    library = Library([broken.root, whole.root])
    first, second = library.home()["runs"]
    assert [one["layer"] for one in first["sites"][0]["layers"]] == [1] and len(second["sites"][0]["layers"]) == 2
    assert "layer-00.parquet: damaged Parquet file" in first["problems"][0] and not second["problems"]
    assert library.table("broken", "codes")["layer"] == [1] * 6
    with pytest.raises(UserError, match="damaged Parquet file .*delete it and run `cratescope collect`"):
        library.card("broken", "codes", 0, 1)
    damage(layer_file(broken.records("codes"), 1))
    [entry] = Library([broken.root]).home()["runs"]
    assert entry["sites"] == [] and "damaged" in entry["problems"][0]


def test_damaged_scores_are_a_problem_of_their_site(tmp_path: Path) -> None:
    run = made(tmp_path / "broken")
    damage(layer_file(run.scores("codes", "offline", "list-pmi"), 1))
    [entry] = Library([run.root]).home()["runs"]
    assert entry["sites"] == [] and "run `cratescope score` again" in entry["problems"][0]


def test_tokens_that_the_tokenizer_does_not_have_are_said_to_be_so(tmp_path: Path) -> None:
    run = made(tmp_path / "foreign")
    path = layer_file(run.records("codes"), 0)
    records = read_records(path)
    first = records[0]
    window = replace(first.top[0], tokens=first.top[0].tokens + 10_000)
    write_records(path, [replace(first, top=(window, *first.top[1:])), *[records[index] for index in range(1, 6)]])
    card = Library([run.root]).card("foreign", "codes", 0, 0)
    assert "tokens that the tokenizer of foreign does not have" in card["problem"]
    assert card["windows"][0]["tokens"][0] == ""


def test_without_a_tokenizer_tokens_are_shown_as_their_ids(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "mute")
    card = Library([run.root]).card("mute", "codes", 0, 0)
    assert card["windows"][0]["tokens"][0].startswith("#") and "no tokenizer" in card["problem"]


def test_milestones_are_a_units_life_and_runs_of_their_own(tmp_path: Path) -> None:
    run = made(tmp_path / "old")
    for step in (10, 20):
        made(run.milestone(step).root, seed=step, tokens_trained=step * 1000)
    manifest = read_json(run.milestone(10).manifest)
    write_json(run.milestone(10).manifest, manifest | {"steps": 10})
    library = Library([run.root])
    card = library.card("old", "codes", 1, 2)
    assert [one["tokens"] for one in card["life"]] == [10_000, 20_000] and card["life"][0]["step"] == 10
    assert card["life"][0]["explanation"] and len(card["life"][0]["top"]) == 3 and card["life"][0]["score"] is not None
    [entry] = library.home()["runs"]
    assert [one["run"] for one in entry["life"]] == ["old-step-000010", "old-step-000020"]
    assert library.card("old-step-000010", "codes", 1, 2)["numbers"] == card["life"][0]["numbers"]


HOSTILE = "a\"b<c>&'; é"


def test_names_and_explanations_with_markup_stay_plain_text(tmp_path: Path) -> None:
    run = made(tmp_path / HOSTILE, explanation="<script>alert(1)</script>")
    library = Library([run.root])
    assert library.home()["runs"][0]["name"] == HOSTILE
    assert library.card(HOSTILE, "codes", 0, 1)["explanations"][0]["text"] == "<script>alert(1)</script>"


def test_search_finds_explanations_and_windows_whose_peak_is_at_the_word(library: Library) -> None:
    found = Search().find([*library.opened.values()], "LICENCE")
    windows = [hit for hit in found["hits"] if hit["field"] == "window"]
    assert windows and not [hit for hit in found["hits"] if hit["field"] == "explanation"]
    for hit in windows:
        assert hit["marks"] and all(hit["snippet"][low:high].lower() == "licence" for low, high in hit["marks"])
        card = library.card(hit["run"], hit["site"], hit["layer"], hit["index"])
        tops = ["".join(one["tokens"]) for one in card["windows"] if one["kind"] == "top"]
        assert any(hit["snippet"] in text for text in tops)
    said = Search().find([*library.opened.values()], "about the law")["hits"]
    assert said[0]["field"] == "explanation" and said[0]["snippet"] == "words about the law"


def every_top_window(library: Library, word: str) -> set[tuple[str, int, int]]:
    """Units with a top window that has the word, by reading all of them."""
    return {
        (name, layer, index)
        for name, opened in library.opened.items()
        for site in opened.sites.values()
        for layer in site.layers
        for index, record in read_records(site.file(layer)).items()
        if any(f" {word}" in "".join(opened.decode(window.tokens.tolist())) for window in record.top)
    }


@pytest.mark.parametrize("word", ["licence", "captain", "def", "January"])
def test_search_finds_every_unit_with_the_word_and_no_other(library: Library, word: str) -> None:
    hits = Search().find([*library.opened.values()], word)["hits"]
    found = {(hit["run"], hit["layer"], hit["index"]) for hit in hits if hit["field"] == "window"}
    assert found == every_top_window(library, word)


def test_a_run_that_has_gone_is_named_and_hides_no_other_from_search(tmp_path: Path) -> None:
    gone, whole = made(tmp_path / "gone"), made(tmp_path / "whole")
    library = Library([gone.root, whole.root])
    library.home()
    shutil.rmtree(gone.root)
    found = Search().find([*library.opened.values()], "licence")
    assert found["hits"] and {hit["run"] for hit in found["hits"]} == {"whole"}
    assert found["problems"] and all("gone" in told for told in found["problems"])


def test_search_finds_words_at_their_beginning_only(library: Library) -> None:
    find = Search().find
    assert (
        find([*library.opened.values()], "icence")["hits"] == [] and find([*library.opened.values()], "licen")["hits"]
    )
    assert find([*library.opened.values()], "  ")["hits"] == []
    with pytest.raises(UserError, match="at most 200 characters"):
        find([*library.opened.values()], "a" * 201)


def test_numbers_are_rounded_to_significant_digits_and_never_infinite() -> None:
    assert numbers([0.123456789, -1234.5678, 0.0, np.nan, np.inf], 3) == [0.123, -1230.0, 0.0, None, None]
    assert numbers([1e-30, 1.23456e38, 5e-324], 3) == pytest.approx([1e-30, 1.23e38, 5e-324], rel=1e-3)
    assert number(float("-inf")) is None and number(7) == 7 and number(0.123456789) == 0.12346
    assert finite({"a": [1.0, float("nan")], "b": (float("inf"),)}) == {"a": [1.0, None], "b": [None]}


def test_control_names_are_those_of_scores(library: Library) -> None:
    [said] = library.card("gpt2", "mlp", 0, 0)["explanations"]
    assert OWN in said["controls"] and "untrained" not in {row["name"] for row in said["scores"][0]["controls"]}


def test_an_untrained_copy_without_such_scores_is_no_control(tmp_path: Path) -> None:
    run, copy = made(tmp_path / "crate"), made(tmp_path / "copy", tokens_trained=0)
    shutil.rmtree(copy.root / "scores")
    [said] = Library([run.root, copy.root]).card("crate", "codes", 0, 1)["explanations"]
    assert "untrained" not in {row["name"] for row in said["scores"][0]["controls"]}
