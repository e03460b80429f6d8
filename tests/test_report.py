"""The report: its numbers are the files', its text is escaped, and the page needs nothing from outside."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import operator
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.arm import Arm
from cratescope.errors import UserError
from cratescope.explain.controls import OWN
from cratescope.explain.explained import Explained
from cratescope.explain.protocols import ON_UNIFORM_TEXT
from cratescope.files import read_json, write_json
from cratescope.models.sae import CoderConfig, Origin, SparseCoder, save_coder
from cratescope.neurons.records import Histogram, layer_file, read_records, write_records
from cratescope.report.config import ReportConfig
from cratescope.report.figures import COLOURS, inline, styles
from cratescope.report.frontier import DENSITY, LOSS, frontier_figures
from cratescope.report.html import highlight
from cratescope.report.report import report, spread
from cratescope.report.text import number, sparkline, visible
from cratescope.report.verdict import caveats, headline
from cratescope.results.compare import Comparison, Quantity, against_features, comparisons, sides
from cratescope.results.dictionaries import NUMBERS
from cratescope.results.runs import Results, load_results
from cratescope.results.scores import Scores
from cratescope.results.tables import (
    FORMULA,
    dictionary_rows,
    loss_rows,
    matched_rows,
    neuron_rows,
    paper,
    quality_rows,
    score_rows,
    write_csv,
)
from cratescope.run import Run
from cratescope.score import scores as scored
from fake_run import PROTOCOLS, Fake, fake_run, fake_tokenizer
from kept_files import change, read_scores

PRIMARY = Quantity("random-only", "pearson", "shuffled")
NASTY = "<script>alert('x')</script> \"a\" & $b_c$"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CRATE and a GPT-2 run; the second one's explanations are hostile."""
    root = tmp_path_factory.mktemp("runs")
    fake_run(root / "crate", Fake())
    fake_run(root / "gpt2", Fake(family="gpt2", quality=0.3, explanation=NASTY))
    return root / "crate", root / "gpt2"


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Two seeds of each family, and the untrained copy of every run."""
    root, made = tmp_path_factory.mktemp("seeds"), []
    for family in ("crate", "gpt2"):
        for seed in (0, 1):
            for tokens in (2_000_000, 0):
                fake = Fake(family, "1l", layers=1, seed=seed, tokens_trained=tokens, quality=0.7 if tokens else 0.1)
                made.append(fake_run(root / f"{family}-{seed}-{tokens}", fake).root)
    return load_results(tuple(made))


def settings_for(runs: tuple[Path, ...], out: Path, **changes: Any) -> ReportConfig:
    return ReportConfig(runs=runs, out=out, primary="random-only/pearson/shuffled", **changes)


@pytest.fixture(scope="session")
def written(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    return report(settings_for(runs, out, cards=3), tokenizer=fake_tokenizer()).parent


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def plain_text(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / run.name))


def edit(path: Path, **changes: Any) -> None:
    write_json(path, read_json(path) | changes)


def scores_of(run: Path, site: str = "codes") -> Scores:
    return Scores(read_scores(Run(run).scores(site, "offline", "list-pmi")))


def edit_arm(run: Path, **changes: Any) -> None:
    edit(run / "run.json", arm=read_json(run / "run.json")["arm"] | changes)


def test_the_score_table_follows_from_the_rows_of_score(runs: tuple[Path, Path], written: Path) -> None:
    names = ("model", "protocol", "measure", "layer")
    rows = {tuple(row[name] for name in names): row for row in rows_of(written / "scores.csv")}
    measured = sum(len(protocol.measures) for protocol in PROTOCOLS.values())
    assert len(rows) == 2 * measured * 3, "a model's measures, on two layers and as mean"
    for path, site in zip(runs, ("codes", "mlp"), strict=True):
        lines = read_scores(Run(path).scores(site, "offline", "list-pmi"))
        for (model, protocol, measure, layer), row in rows.items():
            if model != path.name or layer == "mean":
                continue
            mine = [
                item
                for item in lines
                if (item.protocol, item.measure, str(item.neuron.layer)) == (protocol, measure, layer)
            ]
            own = {item.neuron: item.value for item in mine if item.control == OWN and item.value is not None}
            assert float(row["mean"]) == pytest.approx(np.mean([*own.values()]))
            assert float(row["standard_error"]) == pytest.approx(np.std([*own.values()], ddof=1) / np.sqrt(len(own)))
            counts = {"n_scored": str(len(own)), "n_none": str(6 - len(own)), "n_dead": "1", "n_neurons": "6"}
            assert {name: row[name] for name in counts} == counts and 3 <= len(own) <= 4
            for control in ("shuffled", "empty", "unigram"):
                null = {item.neuron: item.value for item in mine if item.control == control and item.value is not None}
                assert float(row[control]) == pytest.approx(np.mean([*null.values()]))
                both = [own[neuron] - null[neuron] for neuron in own.keys() & null.keys()]
                assert float(row[f"over_{control}"]) == pytest.approx(np.mean(both))
            assert row["explanation_set"] == "top"
    for model in ("crate", "gpt2"):
        layers = [float(rows[model, "random-only", "pearson", layer]["mean"]) for layer in "01"]
        mean = rows[model, "random-only", "pearson", "mean"]
        assert float(mean["mean"]) == pytest.approx(np.mean(layers))
        assert float(mean["variance_over_layers"]) == pytest.approx(np.var(layers))
        assert float(mean["low"]) <= float(mean["mean"]) <= float(mean["high"])
    assert rows["crate", "top-and-random", "pearson", "0"]["paper"] == "7.8"
    assert rows["crate", "top-and-random", "spearman", "0"]["paper"] == ""
    as_json = json.loads((written / "scores.json").read_text())["scores"]
    assert [row["mean"] for row in as_json] == [float(row["mean"]) for row in rows.values()]


def test_the_neuron_table_has_every_neuron_with_its_scores(runs: tuple[Path, Path], written: Path) -> None:
    rows = {(row["model"], int(row["layer"]), int(row["index"])): row for row in rows_of(written / "neurons.csv")}
    assert len(rows) == 2 * 2 * 6
    for score in read_scores(Run(runs[0]).scores("codes", "offline", "list-pmi")):
        if score.measure in ON_UNIFORM_TEXT and score.control == OWN:
            cell, name = rows["crate", score.neuron.layer, score.neuron.index], f"{score.protocol}_{score.measure}"
            numbers = (score.value, score.low, score.high)
            assert [cell[f"{name}_{what}"] for what in ("score", "low", "high")] == [
                "" if value is None else repr(value) for value in numbers
            ]
        if score.measure == "pearson":
            cell = rows["crate", score.neuron.layer, score.neuron.index]
            name = f"{score.protocol}_{'score' if score.control == OWN else score.control}"
            assert cell[name] == ("" if score.value is None else repr(score.value))
            if score.control == OWN:
                assert cell[f"{score.protocol}_low"] == ("" if score.low is None else repr(score.low))
    assert (
        rows["crate", 0, 1]["random-only_specific_low"] and "top-and-random_specific_score" not in rows["crate", 0, 1]
    )
    assert rows["crate", 0, 5]["explanation"] == "" and float(rows["crate", 0, 5]["density"]) == 0
    assert rows["gpt2", 0, 1]["explanation"] == NASTY


def test_the_loss_table_has_the_curves_and_the_final_evaluation(written: Path) -> None:
    rows = rows_of(written / "losses.csv")
    kinds = [row["kind"] for row in rows if row["model"] == "crate"]
    assert (kinds.count("train"), kinds.count("validation"), kinds.count("final")) == (100, 10, 1)
    assert float(rows[kinds.index("final")]["unigram_entropy"]) == 6.61


def test_the_activity_table_says_how_sparse_each_layer_is(runs: tuple[Path, Path], written: Path) -> None:
    rows = {(row["model"], row["layer"]): row for row in rows_of(written / "activity.csv")}
    assert len(rows) == 2 * 3
    for path, site in zip(runs, ("codes", "mlp"), strict=True):
        layers = []
        for layer in range(2):
            records = read_records(layer_file(Run(path).records(site), layer)).values()
            row = rows[path.name, str(layer)]
            layers.append(np.mean([record.density for record in records]))
            assert float(row["active"]) == pytest.approx(layers[-1])
            assert float(row["median_density"]) == pytest.approx(np.median([record.density for record in records]))
            assert (row["n_dead"], row["n_neurons"]) == ("1", "6")
        mean = rows[path.name, "mean"]
        assert float(mean["active"]) == pytest.approx(np.mean(layers)) and mean["n_dead"] == "2"
        page = plain_text((written / "report.html").read_text())
        assert f"{100 * np.mean(layers):.1f} %2 dead" in page
    as_json = json.loads((written / "scores.json").read_text())["activity"]
    assert [row["active"] for row in as_json] == [float(row["active"]) for row in rows.values()]


def histogram(low: list[float], high: list[float], count: list[int]) -> Histogram:
    return Histogram(np.array(low), np.array(high), np.array(count))


def test_bars_follow_the_logarithm_of_the_tokens_in_each_interval() -> None:
    assert sparkline(histogram([0], [1], [8]), 1.0, 4) == "████"
    assert sparkline(histogram([0, 3], [1, 4], [10**8, 1]), 4.0, 4) == "█  ▁"
    assert sparkline(histogram([0, 0], [0, 2], [99, 1]), 2.0, 2) == "█▁"
    assert sparkline(histogram([2], [2.5], [7]), 2.0, 3) == "█  "
    assert sparkline(histogram([-np.inf, 1], [1, np.inf], [1, 9]), 3.0, 2).strip()


def test_the_page_shows_the_numbers_times_100(runs: tuple[Path, Path], written: Path) -> None:
    page = plain_text((written / "report.html").read_text())
    scores = scores_of(runs[0])
    model = scores.mean("random-only")
    assert f"{100 * model.mean:.1f} ± {100 * model.standard_error:.1f}" in page
    assert f"{100 * scores.mean('random-only', control='shuffled', layer=1).mean:.1f} ±" in page
    assert f"{100 * model.low:.1f} … {100 * model.high:.1f}" in page
    assert "8/4/2/12" in page
    assert "2 without a score (1 constant simulation, 1 dead neuron)" in page


def test_every_text_of_a_run_is_escaped(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert "alert(" in page and "<script>alert" not in page
    assert page.count("<script>") == 1
    assert "&lt;b&gt;" in page and " &lt;i&gt;" in page


def test_the_page_asks_nothing_of_the_network(written: Path) -> None:
    page = (written / "report.html").read_text()
    links = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?([^"'>\s]+)""", page)
    links += re.findall(r"url\(([^)]*)\)", page)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in page and "<link" not in page and "<!ENTITY" not in page


def test_the_same_inputs_give_the_same_bytes(runs: tuple[Path, Path], written: Path, tmp_path: Path) -> None:
    again = report(settings_for(runs, tmp_path, cards=3), tokenizer=fake_tokenizer()).parent
    names = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert {path.suffix for path in names} == {".html", ".csv", ".json", ".svg", ".png"}
    assert [name for name in names if (written / name).read_bytes() != (again / name).read_bytes()] == []


def test_a_run_of_which_one_layer_is_scored_has_a_report(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "half", Fake(layers=2, size="2l", neurons=5))
    folder = run.scores("codes", "offline", "list-pmi")
    (folder / "layer-00.parquet").unlink()
    edit(folder / "scores.json", layers=[1])
    assert report(ReportConfig(runs=(run.root,), out=tmp_path / "out"), tokenizer=fake_tokenizer()).exists()


def test_a_missing_number_is_a_dash_with_its_count_and_never_nan(tmp_path: Path) -> None:
    """A layer without any score, as an untrained or collapsed model may have, still makes a whole report."""
    run = fake_run(tmp_path / "silent", Fake(layers=1, size="1l", neurons=5, dead=(2, 3, 4), flat=()))
    scores = scored.scores(run.scores("codes", "offline", "list-pmi"))
    silent = [[dataclasses.replace(item, value=None) for item in items] for items in scores.read(0).values()]
    scores.replace(0, silent)
    text = run.evaluation.read_text()
    run.evaluation.write_text(text.replace('"bits_per_byte": 1.72', '"bits_per_byte": null'))
    page = report(ReportConfig(runs=(run.root,), out=tmp_path / "out"), tokenizer=fake_tokenizer()).read_text()
    body = page.partition("<body>")[2].partition("<script>")[0]
    assert not re.search(r"\bnan\b", body, re.I) and ">None<" not in body
    assert re.search(r'<td class="first">–</td>\s*(<td class="se">–</td>\s*){5}<td class="se">0/5/3/5', body)
    assert "No neuron of this layer has a score." in body and "3 dead neuron" in body
    assert "nan" not in (tmp_path / "out" / "losses.csv").read_text()


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("run.json", "cratescope train"),
        ("evaluation.json", "cratescope evaluate"),
        ("scores/codes/offline/list-pmi/scores.json", "cratescope score"),
        ("scores/codes/offline/list-pmi/layer-01.parquet", "cratescope score"),
        ("records/codes/layer-01.parquet", "cratescope collect"),
        ("simulations/codes/offline/list-pmi/top/layer-00.parquet", "cratescope simulate"),
    ],
)
def test_a_missing_piece_names_the_file_and_the_command(
    runs: tuple[Path, Path], tmp_path: Path, missing: str, command: str
) -> None:
    run = copy_of(runs[0], tmp_path)
    (run / missing).unlink()
    with pytest.raises(UserError, match=command) as caught:
        report(ReportConfig(runs=(run,), out=tmp_path / "out"), tokenizer=fake_tokenizer())
    assert Path(missing).name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_comes_from_the_runs_model_folder(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "crate", Fake(layers=1, size="1l"))
    config = ReportConfig(runs=(run.root,), out=tmp_path / "out", cards=1)
    with pytest.raises(UserError, match="cratescope train"):
        report(config)
    fake_tokenizer().save_pretrained(run.model)
    page = report(config).read_text()
    record = read_records(layer_file(run.records("codes"), 0), [1])[1].random[0]
    assert sum(fake_tokenizer().decode([token]) in page for token in record.tokens) > 6


def test_scores_of_another_simulator_are_pointed_out(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="or give --simulator list-pmi .*: offline/list-pmi"):
        report(ReportConfig(runs=runs, out=tmp_path, simulator="all-at-once"), tokenizer=fake_tokenizer())


def test_no_runs_or_two_of_one_name_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        report(ReportConfig(runs=(), out=tmp_path), tokenizer=fake_tokenizer())
    with pytest.raises(UserError, match="'crate'"):
        report(ReportConfig(runs=(runs[0], runs[0]), out=tmp_path), tokenizer=fake_tokenizer())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.text(max_size=6), st.floats(-1, 5), st.floats(0, 3)), max_size=12), st.booleans())
def test_highlighting_never_drops_or_reorders_tokens(rows: list[tuple[str, float, float]], both: bool) -> None:
    tokens = [token for token, _, _ in rows]
    truth = np.array([value for _, value, _ in rows], dtype=np.float32)
    markup = highlight(tokens, truth, 5.0, [guess for *_, guess in rows] if both else None, 3.0)
    cells = re.findall(r"<(?:i|b [^>]*)>(.*?)</[ib]>", markup, re.S)
    assert [html.unescape(cell) for cell in cells] == [visible(token) for token in tokens]
    assert "".join(f"<x>{cell}</x>" for cell in cells) == re.sub(r"<(/?)[ib]\b[^>]*>", r"<\1x>", str(markup))


def test_shading_follows_the_activation_and_says_its_number() -> None:
    markup = highlight([" a", " b", " c"], np.array([0.0, 2.0, 4.0], dtype=np.float32), 4.0, [0.0, 0.0, 1.0], 2.0)
    assert markup == (
        "<i> a</i>"
        '<b style="--a:.5" title="true 2, simulated 0"> b</b>'
        '<b style="--a:1.0;--s:.5" title="true 4, simulated 1"> c</b>'
    )


@pytest.mark.parametrize(("token", "shown"), [("\n\n", "↵↵"), ("\t", "⇥"), ("  ", "··"), (" a", " a"), ("\0", "␀")])
def test_white_space_and_control_characters_are_seen(token: str, shown: str) -> None:
    assert visible(token) == shown


@given(st.integers(0, 40), st.integers(1, 12))
def test_cards_are_spread_from_the_best_to_the_worst(ranked: int, cards: int) -> None:
    ranking = [7 * index for index in range(ranked)]
    ranks = [rank for rank, neuron in spread(ranking, cards) if neuron == ranking[rank - 1]]
    assert len(ranks) == min(ranked, cards) and ranks == sorted(set(ranks))
    assert not ranks or ranks[0] == 1
    assert len(ranks) < 2 or ranks[-1] == ranked


def find(
    groups: list[list[Comparison]], over: str | None, protocol: str = "random-only", trained: bool = True
) -> Comparison:
    return next(
        pair
        for group in groups
        for pair in group
        if (pair.quantity.protocol, pair.quantity.over, pair.tokens_trained > 0) == (protocol, over, trained)
    )


def test_other_gains_of_the_kind_of_the_primary_one_follow_it(runs: tuple[Path, Path]) -> None:
    (group,) = comparisons(load_results(runs), Quantity.parse("random-only/specific/shuffled"))
    found = [(pair.quantity.measure, pair.quantity.over) for pair in group if pair.quantity.protocol == "random-only"]
    gains = [(measure, "shuffled") for measure in ("specific", "balanced", "unseen", "pearson")]
    assert found == [*gains[:3], ("pearson", None), gains[3]]


def test_the_headline_follows_from_the_numbers(runs: tuple[Path, Path], tmp_path: Path) -> None:
    results = load_results(runs)
    groups = comparisons(results, PRIMARY)
    pair = groups[0][0]
    assert pair.primary and pair.unit == "neurons"
    crate, gpt2 = (item.scores.mean("random-only", over="shuffled") for item in results)
    assert pair.difference == pytest.approx(crate.mean - gpt2.mean)
    assert pair.standard_error == pytest.approx(np.hypot(crate.standard_error, gpt2.standard_error))
    raw = find(groups, None)
    crate, gpt2 = (item.scores.mean("random-only") for item in results)
    assert raw.difference == pytest.approx(crate.mean - gpt2.mean)
    said = headline([pair])
    assert number(pair.difference, sign=True) in said and "primary measure (random-only, pearson, gain over" in said
    assert pair.test is not None and ("not told apart" in said) == (pair.test.p >= 0.05)
    sure = dataclasses.replace(pair, test=pair.test._replace(p=0.001))
    assert "CRATE is ahead" in headline([sure]) or "GPT-2 is ahead" in headline([sure])
    assert "too few values" in headline([dataclasses.replace(pair, test=None)])
    assert "one training run" in " ".join(caveats(results, groups, PRIMARY))


def test_several_seeds_are_compared_with_the_seed_as_the_unit(seeds: list[Results]) -> None:
    groups = comparisons(seeds, PRIMARY)
    pair = find(groups, None)
    means = {
        family: [item.scores.mean("random-only").mean for item in seeds if item.arm.family == family][::2]
        for family in ("crate", "gpt2")
    }
    assert pair.a.seeds.keys() == {0, 1} and pair.a.mean == pytest.approx(np.mean(means["crate"]))
    assert pair.a.standard_error == pytest.approx(np.std(means["crate"], ddof=1) / np.sqrt(2))
    differences = np.subtract(means["crate"], means["gpt2"])
    assert pair.test is not None and pair.test.paired and pair.unit == "seeds"
    assert pair.test.standard_error == pytest.approx(np.std(differences, ddof=1) / np.sqrt(2))
    assert pair.test.effect == pytest.approx(differences.mean() / np.std(differences, ddof=1))
    assert pair.seeds_needed() is not None and pair.neurons_needed(1e-4) > pair.neurons_needed(0.5)
    assert "over training seeds" in " ".join(caveats(seeds, groups, PRIMARY))


def test_an_untrained_run_of_the_same_preset_and_seed_is_a_control(seeds: list[Results]) -> None:
    rows = [row for row in score_rows(seeds) if (row["protocol"], row["layer"]) == ("random-only", "mean")]
    own = {row["model"]: row for row in rows if row["measure"] == "pearson"}
    for family in ("crate", "gpt2"):
        for seed in (0, 1):
            trained, copy = own[f"{family}-{seed}-2000000"], own[f"{family}-{seed}-0"]
            assert trained["untrained"] == copy["mean"] and copy["untrained"] is None
            assert trained["over_untrained"] == pytest.approx(trained["mean"] - copy["mean"])
    pair = find(comparisons(seeds, PRIMARY), "untrained")
    assert pair.a.seeds[0] == pytest.approx(own["crate-0-2000000"]["over_untrained"])
    assert "No untrained model" not in " ".join(caveats(seeds, [], PRIMARY))


def test_the_untrained_pair_is_compared_last(seeds: list[Results]) -> None:
    groups = comparisons(seeds, PRIMARY)
    assert [group[0].tokens_trained for group in groups] == [2_000_000, 0]
    assert all(group[0].primary for group in groups)
    assert "untrained" in headline(groups[1])


def test_at_equal_loss_the_faster_arm_is_taken_between_two_of_its_milestones(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    early = Path(fake_run(tmp_path / "gpt2-early", Fake("gpt2", quality=0.2)).root)
    edit_arm(early, tokens_trained=1_000_000)
    edit(early / "evaluation.json", loss=5.9)
    results = load_results((*runs, early))
    crate, final, milestone = (item.scores.mean("random-only", over="shuffled").mean for item in results)
    losses = [item.evaluation["loss"] for item in results]
    assert losses == [5.5, 5.2, 5.9]
    tokens, loss = comparisons(results, PRIMARY)
    assert tokens[0].loss is None and loss[0].loss == 5.5 and loss[0].tokens_trained is None
    share = 0.4 / 0.7
    assert loss[0].a.mean == crate and loss[0].b.mean == pytest.approx(share * final + (1 - share) * milestone)
    assert loss[0].b.loss == pytest.approx(5.5) and loss[0].test is None
    assert "at a validation loss of 5.50 nats" in headline(loss)
    options = ReportConfig((*runs, early), tmp_path / "report", primary="random-only/pearson/shuffled")
    page = report(options, fake_tokenizer())
    assert "loss 5.50" in page.read_text()
    edit(early / "evaluation.json", loss=5.4)
    assert len(comparisons(load_results((*runs, early)), PRIMARY)) == 1, "it had that loss before its first milestone"


@pytest.mark.parametrize("text", ["uniform", "a/b/c/d", "uniform//shuffled"])
def test_a_primary_measure_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="protocol/measure/control"):
        Quantity.parse(text)


def test_a_primary_measure_that_was_not_scored_is_said_to_be_missing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    results = load_results(runs)
    primary = Quantity.parse(ReportConfig.primary)
    groups = comparisons(results, primary)
    assert not any(pair.primary for group in groups for pair in group)
    assert f"({primary.name}) was not scored" in " ".join(caveats(results, groups, primary))


@pytest.mark.parametrize("name", ON_UNIFORM_TEXT)
def test_a_measure_on_uniform_text_may_be_the_primary_one(seeds: list[Results], name: str) -> None:
    primary = Quantity.parse(f"random-only/{name}/shuffled")
    pair = comparisons(seeds, primary)[0][0]
    rows = [row for row in score_rows(seeds) if (row["protocol"], row["measure"]) == ("random-only", name)]
    trained = [row for row in rows if row["layer"] == "mean" and row["tokens_trained"]]
    for side, family in ((pair.a, "crate"), (pair.b, "gpt2")):
        gained = [row["over_shuffled"] for row in trained if row["family"] == family]
        assert len(gained) == 2 and side.mean == pytest.approx(np.mean(gained))
    assert pair.primary and f"primary measure (random-only, {name}, gain over shuffled)" in headline([pair])
    assert pair.difference != comparisons(seeds, PRIMARY)[0][0].difference


def test_scores_and_activity_are_compared_at_matched_density_too(seeds: list[Results]) -> None:
    rows = matched_rows(seeds, sides(seeds), PRIMARY)
    assert [(row["a"], row["b"]) for row in rows] == [
        (f"crate-{seed}-{tokens}", f"gpt2-{seed}-{tokens}") for seed in (0, 1) for tokens in (2_000_000, 0)
    ]
    assert all(0 < row["lookup_n"] <= 5 and 0 < row["primary_n"] <= 5 for row in rows)
    scores = {item.label: PRIMARY.by_index(item)[0].values() for item in seeds}
    for row in rows:
        assert all(min(scores[row[a]]) <= row[f"{a}_primary"] <= max(scores[row[a]]) for a in "ab")
        assert row["a_primary"] != row["b_primary"]
    layers = [row for row in quality_rows(seeds) if row["layer"] == 0]
    assert len(layers) == len(seeds) and {row["distinct_explanations"] for row in layers} == {5}


@pytest.mark.parametrize(
    "changes", [{"tokens_trained": 1}, {"data": {"path": "x", "manifest_sha256": "f"}}, {"context": 512}]
)
def test_runs_that_differ_in_more_than_the_arm_are_not_compared(
    runs: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = copy_of(runs[0], tmp_path)
    edit(run / "run.json", **changes)
    if "tokens_trained" in changes:
        edit_arm(run, **changes)
    results = load_results((run, runs[1]))
    assert comparisons(results, PRIMARY) == []
    assert "no comparison" in " ".join(caveats(results, [], PRIMARY))


def test_an_arm_names_the_blocks_of_a_variant() -> None:
    paper, variant = (
        Arm.trained("crate-2l", 0, 0, fields) for fields in ({}, {"attention": "mhsa", "ista_steps": "3"})
    )
    assert (paper.attention, paper.feed_forward, paper.name) == ("mssa", "ista", "crate")
    assert (variant.attention, variant.feed_forward) == ("mhsa", "ista")
    assert variant.name == "crate attention=mhsa ista_steps=3"


def test_a_variant_is_an_arm_of_its_own(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "steps"))
    edit_arm(run, variant="ista_steps=3")
    results = load_results((*runs, run))
    assert [item.arm.title for item in results] == ["CRATE", "GPT-2", "CRATE ista_steps=3"]
    usual, chosen = (comparisons(results, PRIMARY, pair)[0][0] for pair in ((), ("crate ista_steps=3", "crate")))
    assert (usual.a.title, usual.b.title) == ("CRATE", "GPT-2")
    assert (chosen.a.title, chosen.b.title, chosen.difference) == ("CRATE ista_steps=3", "CRATE", 0)
    assert {row["paper"] for row in score_rows(results[2:])} == {None}
    with pytest.raises(UserError, match="--compare crate llama: give pairs of two of the arms crate, gpt2"):
        sides(results, ("crate", "llama"))


def test_several_pairs_are_compared_each_in_a_table(runs: tuple[Path, Path], tmp_path: Path) -> None:
    steps = Path(shutil.copytree(runs[0], tmp_path / "steps"))
    edit_arm(steps, variant="ista_steps=3")
    early = Path(shutil.copytree(runs[0], tmp_path / "early"))
    edit_arm(early, variant="ista_steps=4", tokens_trained=1)
    pairs = ("crate", "gpt2", "crate ista_steps=3", "gpt2", "crate", "gpt2", "crate ista_steps=4", "gpt2")
    page = report(
        settings_for((*runs, steps, early), tmp_path / "report", compare=pairs), tokenizer=fake_tokenizer()
    ).read_text()
    found = json.loads((tmp_path / "report" / "scores.json").read_text())["comparisons"]
    assert [*dict.fromkeys((item["a"]["arm"], item["b"]["arm"]) for item in found)] == [pairs[:2], pairs[2:4]]
    assert "training tokens: crate ista_steps=4 with gpt2." in html.unescape(page)
    for wrong in (("crate",), ("crate", "crate"), ("crate", "gpt2", "crate")):
        with pytest.raises(UserError, match=f"--compare {' '.join(wrong)}: give pairs"):
            settings_for(runs, tmp_path, compare=wrong)
    for title in ("CRATE", "CRATE ista_steps=3"):
        assert re.search(rf'<th class="dot arm\d">{title}</th><th class="dot arm\d">GPT-2</th>', page)


def test_two_explanation_sets_are_shown_each_with_its_own_scores(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A protocol that explains from other windows gets other texts, and its scores are of these."""
    run = Run(copy_of(runs[0], tmp_path))
    explained = Explained(run, "codes", "offline", "top")
    for stage in (explained.explanations, explained.simulations("list-pmi")):
        shutil.copytree(stage.folder, stage.folder.with_name("openai"))
    for layer in range(2):
        change(dataclasses.replace(explained, set="openai").explanations, layer, 0, text="rain in spring")
    folder = run.scores("codes", "offline", "list-pmi")
    scores = scored.scores(folder)
    for layer in range(2):
        items = scores.read(layer).values()
        moved = [
            [dataclasses.replace(one, protocol="openai", set="openai") for one in item if one.protocol == "random-only"]
            for item in items
        ]
        scores.replace(layer, map(operator.add, items, moved))
    made_with = read_json(folder / "scores.json")["made_with"]
    edit(folder / "scores.json", made_with=made_with | {"openai": made_with["top"] | {"llm": "other"}})
    results = load_results((run.root,))
    rows = {(row["layer"], row["index"], row["explanation_set"]): row for row in neuron_rows(results)}
    top, other = rows[0, 0, "top"], rows[0, 0, "openai"]
    assert (top["explanation"], other["explanation"]) == ("words about the law", "rain in spring")
    assert top["openai_score"] is None and other["random-only_score"] is None
    assert other["openai_score"] == top["random-only_score"] is not None
    page = plain_text(
        report(ReportConfig(runs=(run.root,), out=tmp_path / "out"), tokenizer=fake_tokenizer()).read_text()
    )
    assert re.search(
        r"words about the law · from top\s.*?random-only.*?rain in spring · from openai\s.*?openai ", page, re.S
    )
    with_one = load_results((runs[0],))
    assert results[0].matter != with_one[0].matter, "the other set was made by another model"


def test_a_set_that_says_nothing_of_a_neuron_is_left_out_of_its_card(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """As when fewer neurons were explained for one protocol than for another; one of them was only judged."""
    run = Run(copy_of(runs[0], tmp_path))
    explained = Explained(run, "codes", "offline", "top")
    second = dataclasses.replace(explained, set="second")
    first_neuron = min(explained.explanations.read(0))
    told = explained.explanations.read(0)[first_neuron]
    second.explanations.write([dataclasses.replace(told, text="rain in spring")])
    folder = run.scores("codes", "offline", "list-pmi")
    scores = scored.scores(folder)
    row = next(one for one in scores.read(0)[first_neuron] if one.control == "own")
    judged = dataclasses.replace(row, protocol="detection", set="second", measure="accuracy", value=0.75)
    scores.replace(0, (item + [judged] * (index == first_neuron) for index, item in scores.read(0).items()))
    made_with = read_json(folder / "scores.json")["made_with"]
    edit(folder / "scores.json", made_with=made_with | {"second": made_with["top"]})
    config = ReportConfig(runs=(run.root,), out=tmp_path / "out", cards=20)
    page = plain_text(report(config, tokenizer=fake_tokenizer()).read_text())
    assert page.count("rain in spring · from second") == page.count(" · from top") == 1 < page.count("rank ")
    for layer in range(2):
        explained.simulations("list-pmi").replace(layer, [])
    with pytest.raises(UserError, match="has no neuron .* run `cratescope simulate"):
        report(dataclasses.replace(config, out=tmp_path / "again"), tokenizer=fake_tokenizer())


def test_two_sites_of_one_run_are_two_rows_with_one_loss_curve(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy_of(runs[0], tmp_path)
    for stage in ("scores", "records", "explanations", "simulations"):
        shutil.copytree(run / stage / "codes", run / stage / "sae")
    results = load_results((run,))
    assert {row["model"] for row in score_rows(results)} == {"crate · codes", "crate · sae"}
    assert {row["model"] for row in neuron_rows(results)} == {"crate · codes", "crate · sae"}
    assert len([row for row in loss_rows(results) if row["kind"] == "final"]) == 1


def test_figures_follow_the_page_colours_and_have_no_address(written: Path) -> None:
    found = sorted((written / "figures").glob("*.svg"))
    names = ["density", "frontier", "histogram-density", "histogram-random-only", "histogram-top-and-random"]
    names += ["layers", "loss"]
    assert [path.stem for path in found] == names
    for path in found:
        assert "purl.org" not in path.read_text() and "dc:date" not in path.read_text()
        svg = inline(path)
        assert svg.startswith("<svg") and "var(--arm0)" in svg and "var(--arm1)" in svg and "currentColor" in svg


@pytest.mark.parametrize("protocol", paper()["scores"])
def test_the_papers_means_are_those_of_its_layers(protocol: str) -> None:
    """A slip in copying a layer would break the mean; S and B leave out their last layer, as the paper does."""
    for preset, entry in paper()["scores"][protocol].items():
        layers = entry.get("layers", ())
        kept = layers[:-1] if len(layers) >= 6 else layers
        assert not kept or np.mean(kept) == pytest.approx(entry["mean"], abs=0.06), preset


def test_a_report_is_made_again_only_when_something_it_shows_has_changed(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = copy_of(runs[0], tmp_path)
    config = ReportConfig(runs=(run,), out=tmp_path / "report", cards=1)
    page = report(config, tokenizer=fake_tokenizer())
    first = page.stat().st_mtime_ns
    report(config, tokenizer=fake_tokenizer())
    assert page.stat().st_mtime_ns == first
    edit(Run(run).evaluation, loss=1.23)
    report(config, tokenizer=fake_tokenizer())
    assert page.stat().st_mtime_ns > first and "1.230" in page.read_text()


def test_a_second_run_of_the_same_seed_is_no_replicate(runs: tuple[Path, Path], tmp_path: Path) -> None:
    again = Path(shutil.copytree(runs[0], tmp_path / "again"))
    results = load_results((*runs, again))
    assert {len(pair.a.seeds) for group in comparisons(results, PRIMARY) for pair in group} == {1}
    edit_arm(again, seed=99)
    results = load_results((*runs, again))
    assert {len(pair.a.seeds) for group in comparisons(results, PRIMARY) for pair in group} == {2}


FORMULAS = ["=HYPERLINK(0)", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "'quoted", "'=1"]


def test_no_spreadsheet_runs_a_text_of_a_csv_file_and_numbers_stay_numbers(tmp_path: Path) -> None:
    plain = ["a = b", " =1", "", 'words, "quoted"; more']
    rows: list[dict[str, Any]] = [{"text": text, "number": -1.5} for text in FORMULAS + plain]
    write_csv(tmp_path / "a.csv", lambda: rows)
    found = rows_of(tmp_path / "a.csv")
    cells = [row["text"] for row in found]
    assert not [cell for cell in cells if cell.startswith(FORMULA[:-1])]
    assert [cell.removeprefix("'") for cell in cells] == FORMULAS + plain
    assert cells[len(FORMULAS) :] == plain and {row["number"] for row in found} == {"-1.5"}


# Models trained elsewhere


def adopted_run(root: Path, family: str = "llama", source: str = "somewhere/tiny-llama") -> Path:
    """A run of a model of whose training nothing is known."""
    run = fake_run(root, Fake(family="gpt2", size="2l"))
    unknown = ("steps", "n_neurons", "settings", "seconds")
    manifest = {name: value for name, value in read_json(run.manifest).items() if name not in unknown}
    arm = Arm.adopted(source, family, 2, manifest["parameters"], "mlp")
    write_json(run.manifest, manifest | {"arm": arm.row(), "adopted": source})
    run.metrics.unlink()
    return run.root


def test_a_model_trained_elsewhere_has_a_report_of_its_own(tmp_path: Path) -> None:
    run = adopted_run(tmp_path / "one")
    page = report(settings_for((run,), tmp_path / "report"), tokenizer=fake_tokenizer()).read_text(encoding="utf-8")
    assert "llama tiny-llama</td>" in page and "<td>None" not in page
    rows = rows_of(tmp_path / "report" / "scores.csv")
    assert {(row["preset"], row["seed"], row["tokens_trained"]) for row in rows} == {("llama-2L-6.64M", "", "")}
    (final,) = rows_of(tmp_path / "report" / "losses.csv")
    assert (final["kind"], final["step"], final["tokens"]) == ("final", "", "") and float(final["loss"]) > 0


def test_a_model_trained_elsewhere_stands_beside_others_and_is_no_side_of_a_comparison(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    # The second one would be the twin of the CRATE run by family and name.
    others = (adopted_run(tmp_path / "llama"), adopted_run(tmp_path / "twin", "gpt2", "somewhere/gpt2-2l"))
    alone, both = (load_results(given) for given in (runs, (*runs, *others)))
    assert comparisons(both, PRIMARY) == comparisons(alone, PRIMARY) != []
    assert matched_rows(both, sides(both), PRIMARY) == matched_rows(alone, sides(alone), PRIMARY)
    assert caveats(both, comparisons(both, PRIMARY), PRIMARY) == caveats(alone, comparisons(alone, PRIMARY), PRIMARY)
    rows = [row for row in score_rows(both) if row["model"] in ("llama", "twin")]
    assert rows and all(row["paper"] is None for row in rows)
    looks = styles(both)
    assert len({looks[name].colour for name in ("crate", "gpt2", "llama")}) == 3


def test_a_run_made_before_there_were_arms_is_read_as_one(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy_of(runs[0], tmp_path)
    manifest = read_json(run / "run.json")
    before = {"family": "crate", "preset": "crate-2l", "seed": 0, "tokens_trained": 2_000_000}
    write_json(run / "run.json", {name: value for name, value in manifest.items() if name != "arm"} | before)
    (new,), (old,) = (load_results((path,)) for path in (runs[0], run))
    assert new.arm == old.arm
    write_json(run / "run.json", {name: value for name, value in manifest.items() if name != "arm"})
    with pytest.raises(UserError, match="family is missing"):
        load_results((run,))


def test_imported_records_have_a_report_alone_and_beside_others(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy_of(runs[0], tmp_path)
    for path in (run / "run.json", run / "evaluation.json", run / "metrics.jsonl"):
        path.unlink()
    write_json(run / "records" / "codes" / "manifest.json", {"identity": {"imported": "openai", "sha256": "0" * 64}})
    run = run.rename(tmp_path / "theirs")
    page = report(settings_for((run,), tmp_path / "one"), tokenizer=fake_tokenizer()).read_text(encoding="utf-8")
    assert "imported theirs" in page and ">None<" not in page
    results = load_results((*runs, run))
    assert [item.arm.family for item in results] == ["crate", "gpt2", "imported"]
    assert comparisons(results, PRIMARY) == comparisons(results[:2], PRIMARY)
    report(settings_for((*runs, run), tmp_path / "three"), tokenizer=fake_tokenizer())


@pytest.mark.parametrize("left", [0, 1, 50, 109])
def test_a_log_that_has_lost_its_end_is_no_shorter_training(tmp_path: Path, left: int) -> None:
    run = fake_run(tmp_path / "run", Fake())
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:left]))
    with pytest.raises(UserError, match=r"metrics.jsonl: ends at step \d+ of 100, so its end is lost; copy it again"):
        load_results((run.root,))


def test_a_model_trained_for_no_step_has_no_log(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", Fake(tokens_trained=0))
    manifest = read_json(run.manifest)
    write_json(run.manifest, manifest | {"steps": 0, "settings": manifest["settings"] | {"steps": 0}})
    run.metrics.unlink()
    assert load_results((run.root,))


def test_reasons_that_differ_in_a_servers_words_are_counted_together(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", Fake(layers=1, size="1l"))
    scores = scored.scores(run.scores("codes", "offline", "list-pmi"))
    reasons = ["refused by the server: a", "refused by the server: b", "refusal (no)"] * 2
    scores.replace(
        0,
        [
            [dataclasses.replace(one, value=None, reason=reason) for one in items]
            for items, reason in zip(scores.read(0).values(), reasons, strict=True)
        ],
    )
    page = report(settings_for((run.root,), tmp_path / "out"), tokenizer=fake_tokenizer()).read_text()
    assert "6 without a score (2 refusal, 4 refused by the server)" in page


def test_a_number_that_rounds_to_zero_has_no_minus_sign() -> None:
    assert [number(value) for value in (-0.0004, -0.004, None)] == ["0.0", "−0.4", "–"]
    assert number(-0.0004, sign=True) == "+0.0"


def test_settings_that_are_not_those_a_run_was_trained_with_are_not_shown(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = Run(copy_of(runs[0], tmp_path))
    manifest = run.read_manifest()
    settings = manifest["settings"] | {"seed": 3}
    identity = {"seed": 3, "learning_rate": 2e-3, "data_sha256": manifest["data"]["manifest_sha256"]}
    edit(run.manifest, settings=settings)
    write_json(run.root / "manifest.json", {"identity": identity})
    load_results((run.root,))
    for damaged in (settings | {"seed": 0}, {name: settings[name] for name in settings.keys() - {"seed"}}):
        edit(run.manifest, settings=damaged)
        with pytest.raises(UserError, match=r"run.json: says seed = (0|None) and .*manifest.json says 3, so one"):
            load_results((run.root,))
    edit(run.manifest, settings=settings, data=manifest["data"] | {"manifest_sha256": "0" * 64})
    with pytest.raises(UserError, match="says data_sha256 = "):
        load_results((run.root,))


def test_scores_of_other_simulations_than_there_are_do_not_get_into_a_report(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = Run(copy_of(runs[0], tmp_path))
    scores = run.scores("codes", "offline", "list-pmi") / "scores.json"
    made_with = read_json(scores)["made_with"]["top"]
    simulations = Explained(run, "codes", "offline", "top").simulations("list-pmi").folder
    write_json(simulations / "manifest.json", {"identity": made_with})
    load_results((run.root,))
    for changed in (
        made_with | {"llm": "other"},
        {"rucords" if name == "records" else name: made_with[name] for name in made_with},
    ):
        edit(scores, made_with={"top": changed})
        with pytest.raises(
            UserError, match="scores.json: is not of the simulations in .*; run `cratescope score` again"
        ):
            load_results((run.root,))


# Features of sparse autoencoders


def add_features(run: Path, name: str = "bt", kind: str = "relu", expansion: int = 16, **origin: Any) -> Path:
    """Give a run, a copy of its own, features that score as its neurons do, and the autoencoder they are of."""
    native = read_json(run / "run.json")["arm"]["site"]
    site = f"sae/{name}"
    for stage in ("scores", "records", "explanations", "simulations"):
        shutil.copytree(run / stage / native, run / stage / f"sae-{name}")
    for layer in range(2):
        path = layer_file(Run(run).records(site), layer)
        records = read_records(path).values()
        path.unlink()
        moved = (dataclasses.replace(one.neuron, site=site) for one in records)
        write_records(path, [dataclasses.replace(one, neuron=id) for one, id in zip(records, moved, strict=True)])
    about = Run(run).scores(site, "offline", "list-pmi") / "scores.json"
    made_with = read_json(about)["made_with"]["top"]
    records = made_with["records"] | {"sae_sha256": {"0": "ab", "1": "cd"}, "sample": 100, "sample_seed": 0}
    edit(about, made_with={"top": made_with | {"site": f"sae-{name}", "records": records}})
    pattern = "transformer.h.{layer}." + ("ista.codes" if native == "codes" else "mlp.act")
    for layer in range(2):
        config = CoderConfig(kind, 4, 4 * expansion)  # type: ignore[arg-type]
        save_coder(
            Run(run).saes(name) / f"layer-{layer:02d}",
            SparseCoder(config, Origin(**{"site": native, "pattern": pattern, "layer": layer} | origin)),
        )
    return run


def quality_of(layer: int) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer, "kind": "batchtopk", "width": 64, **dict.fromkeys(NUMBERS, 0.5)}
    row |= {"l0": 31.9, "mse_error": None, "density": {"edges": [-4.0, -2.0, 0.0], "counts": [3, 1]}}
    return row | {"probing": {"chance": 0.5, "k1": 0.71, "k1_error": 0.01, "k5": 0.8, "k5_error": None}}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, {"7.6", "3.5", "5.55"}),
        ({"kind": "jumprelu"}, {""}),
        ({"expansion": 8}, {""}),
        ({"pattern": "transformer.h.{layer}.attn"}, {""}),
    ],
)
def test_the_paper_has_relu_features_of_16_per_dimension_of_the_native_site(
    runs: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], found: set[str]
) -> None:
    results = load_results((add_features(copy_of(runs[1], tmp_path), **changes),))
    rows = [row for row in score_rows(results) if (row["protocol"], row["measure"]) == ("top-and-random", "pearson")]
    of = {site: {str(row["paper"] or "") for row in rows if row["site"] == site} for site in ("mlp", "sae/bt")}
    assert of == {"mlp": {"4.3", "4.1", "4.2"}, "sae/bt": found}


def test_features_of_an_untrained_model_are_none_of_the_papers(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = add_features(copy_of(runs[1], tmp_path))
    edit_arm(run, tokens_trained=0)
    assert {row["paper"] for row in score_rows(load_results((run,)))} == {None}


def test_features_stand_below_the_neurons_of_their_run_and_are_compared_with_them(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    copies = [copy_of(run, tmp_path) for run in runs]
    before = comparisons(load_results(tuple(copies)), PRIMARY)
    for run in copies:
        add_features(add_features(run, "b", "batchtopk"), "a")
    results = load_results(tuple(copies))
    labels = [
        f"{run} · {site}" for run, own in (("crate", "codes"), ("gpt2", "mlp")) for site in (own, "sae/a", "sae/b")
    ]
    assert [item.label for item in results] == labels
    assert comparisons(results, PRIMARY) == before, "the arms are compared by their neurons"
    found = against_features(results, PRIMARY)
    assert [(pair.a.arm, pair.b.arm) for pair in found] == [
        *(("crate", f"crate + sae/{name}") for name in "ab"),
        *((arm, f"gpt2 + sae/{name}") for name in "ab" for arm in ("crate", "gpt2")),
    ]
    assert all(pair.primary and pair.unit == "neurons" and not pair.only for pair in found)
    assert found[0].difference == 0 and found[2].difference == pytest.approx(before[0][0].difference)
    chosen = comparisons(results, PRIMARY, ("crate", "gpt2 + sae/a"))[0]
    assert chosen[0] == found[2] and "features of GPT-2 + sae/a" in headline(chosen)
    with pytest.raises(UserError, match="give pairs of two of the arms crate, gpt2, crate . sae/a"):
        sides(results, ("crate", "gpt2 + sae/c"))
    alone = matched_rows(load_results(runs), [("crate", "gpt2")], PRIMARY)
    named = [row | {"a": "crate · codes", "b": "gpt2 · mlp"} for row in alone]
    assert matched_rows(results, sides(results), PRIMARY) == named
    looks = styles(results)
    assert len({looks[label].of_site for label in labels[:3]}) == 3


def test_neurons_and_features_of_several_runs_are_compared_with_the_seed_as_the_unit(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    first = add_features(copy_of(runs[1], tmp_path))
    second = add_features(fake_run(tmp_path / "second", Fake("gpt2", seed=1, quality=0.3)).root)
    (pair,) = against_features(load_results((first, second)), PRIMARY)
    assert pair.unit == "seeds" and pair.a.seeds == pair.b.seeds and pair.a.seeds.keys() == {0, 1}


def test_neurons_are_compared_on_the_layers_that_have_features(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = add_features(copy_of(runs[1], tmp_path))
    scores = run / "scores" / "sae-bt" / "offline" / "list-pmi"
    (scores / "layer-00.parquet").unlink()
    write_json(scores / "scores.json", read_json(scores / "scores.json") | {"layers": [1]})
    neurons, features = load_results((run,))
    (pair,) = against_features([neurons, features], PRIMARY)
    assert pair.only == (1,) and pair.layers == 1
    assert pair.a.mean == neurons.scores.mean("random-only", over="shuffled", layer=1).mean


def test_every_measured_dictionary_is_in_the_report(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = add_features(copy_of(runs[1], tmp_path))
    write_json(run / "saes" / "bt" / "quality.json", {"settings": {}, "layers": [quality_of(1), quality_of(0)]})
    (run / "saes" / "unscored").mkdir()
    quality = run / "saes" / "unscored" / "quality.json"
    write_json(quality, {"settings": {}, "layers": [quality_of(0) | {"probing": None}]})
    config = ReportConfig((run,), tmp_path / "out", primary="random-only/pearson/shuffled", cards=1)
    page = report(config, fake_tokenizer()).read_text()
    rows = rows_of(tmp_path / "out" / "saes.csv")
    assert [(row["site"], row["layer"]) for row in rows] == [("sae/bt", "0"), ("sae/bt", "1"), ("sae/unscored", "0")]
    assert [row["probing_k1"] for row in rows] == ["0.71", "0.71", ""] and rows[0]["mse_error"] == ""
    assert '<section id="dictionaries">' in page and "31.9" in page and "features of relu, 64 a layer" in page
    assert "GPT-2 + sae/bt" in page and (tmp_path / "out" / "figures" / "dictionaries.svg").exists()
    write_json(quality, {"settings": {}, "layers": [quality_of(0) | {"l0": 77.7}]})
    assert "77.7" in report(config, fake_tokenizer()).read_text()
    for damage in (
        {"l0": "many"},
        {"probing": {"k1": 0.7}},
        {"density": {"edges": [-1.0, 0.0], "counts": [1, 2]}},
        {"density": {"edges": [0.0, -1.0], "counts": [1]}},
    ):
        write_json(quality, {"settings": {}, "layers": [quality_of(0) | damage]})
        with pytest.raises(UserError, match=r"unscored/quality.json: damaged") as caught:
            load_results((run,))
        assert "\n" not in str(caught.value)


def test_a_report_without_dictionaries_says_nothing_of_them(runs: tuple[Path, Path], written: Path) -> None:
    page = (written / "report.html").read_text()
    assert "dictionaries" not in page.lower() and "autoencoder" not in page and "<dt>Feature" not in page
    assert dictionary_rows(load_results(runs)) == []
    assert json.loads((written / "scores.json").read_text()).keys().isdisjoint({"saes", "against_features"})


@pytest.fixture(scope="session")
def courses(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """A milestone and the end of two seeds, and untrained copies."""
    root, made = tmp_path_factory.mktemp("courses"), []
    for seed in (0, 1):
        for tokens in (2_000_000, 1_000_000, 0):
            fake = Fake("crate", "1l", layers=1, seed=seed, tokens_trained=tokens, quality=0.5)
            made.append(fake_run(root / f"crate-{seed}-{tokens}", fake).root)
            edit(made[-1] / "evaluation.json", loss=8.0 - tokens / 500_000)
    return load_results(tuple(made))


def test_the_frontier_places_every_trained_run_by_density_loss_and_score(courses: list[Results]) -> None:
    [(name, figure)] = frontier_figures(courses, PRIMARY)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert name == "frontier" and len(panels) == 3  # no uniform windows were scored, so the measure before is not there
    trained = [item for item in courses if item.arm.tokens_trained]
    scores = {100 * (PRIMARY.mean(item, courses).mean or 0) for item in trained}
    densities = {100 * float(np.mean(item.densities(0))) for item in trained}
    for axes, x, y in zip(panels, (DENSITY, DENSITY, LOSS), ({6.0, 4.0}, scores, scores), strict=True):
        assert axes.get_xlabel() == x
        trails = [line for line in axes.lines if line.get_linestyle() != "None"]
        ends = [line for line in axes.lines if line.get_linestyle() == "None"]
        assert [len(line.get_xdata()) for line in trails] == [2, 2]  # a seed each, without the untrained copy
        assert [line.get_ydata()[0] for line in ends] == [line.get_ydata()[1] for line in trails]
        assert {round(value, 6) for line in trails for value in line.get_ydata()} == {round(value, 6) for value in y}
        found = {round(value, 6) for line in trails for value in line.get_xdata()}
        assert found == {round(value, 6) for value in ({6.0, 4.0} if x == LOSS else densities)}
    at_end = {line.get_ydata()[0] for line in panels[0].lines if line.get_linestyle() == "None"}
    assert at_end == {4.0}  # 2 million tokens, not the milestone


def test_arms_of_one_hue_have_markers_of_their_own(courses: list[Results]) -> None:
    arms = [dataclasses.replace(item.arm, variant=f"kind {n}") for n, item in enumerate([courses[0]] * len(COLOURS))]
    items = [dataclasses.replace(courses[0], arm=arm, label=f"{n}") for n, arm in enumerate(arms)]
    [(_, figure)] = frontier_figures(items, PRIMARY)
    ends = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert len({(line.get_color(), line.get_marker()) for line in ends}) == len(arms)


def test_one_trained_run_has_no_frontier(courses: list[Results]) -> None:
    assert not [*frontier_figures([item for item in courses if not item.arm.untrained][:1], PRIMARY)]
