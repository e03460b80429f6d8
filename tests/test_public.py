"""The public API: its names, a neuron that shows itself, and docs/python.md, every example of which runs."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import cratescope as cs
from cratescope.explain.controls import OWN
from cratescope.explain.explained import Explained, Explanation, Judgement
from cratescope.report.card import neuron_card
from cratescope.report.config import ShowConfig
from fake_run import Fake, fake_run, fake_tokenizer
from kept_files import read_scores
from test_explain import make_run

SOURCE = Path(cs.__file__).parent
PAGE = (SOURCE.parent.parent / "docs" / "python.md").read_text(encoding="utf-8")
NASTY = "<script>alert('x')</script> & \"b\""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> cs.Run:
    made = fake_run(tmp_path_factory.mktemp("demo") / "demo" / "runs" / "crate-2l", Fake())
    fake_tokenizer().save_pretrained(made.model)
    return made


def test_these_names_are_public() -> None:
    types = ["Arm", "Edit", "Neuron", "NeuronId", "NeuronRecord", "Run", "Score", "UserError"]
    functions = ["collect_records", "explain_neurons", "load_model", "load_results", "load_tokenizer"]
    functions += ["score_neurons", "simulate_neurons", "steered"]
    assert sorted(cs.__all__) == sorted([*types, *functions])
    assert all(isinstance(getattr(cs, name), type) for name in types)
    assert all(callable(getattr(cs, name)) for name in functions)
    assert set(cs.__all__) <= set(dir(cs))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cs.nothing  # noqa: B018


def test_no_public_name_is_hidden_by_a_module() -> None:
    modules = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules & set(cs.__all__) == set()


def test_every_public_name_is_documented() -> None:
    page = re.sub(r"[^\w.]", " ", PAGE).split()
    missing = [name for name in cs.__all__ if f"cs.{name}" not in " ".join(page)]
    assert missing == ["Arm", "Neuron", "NeuronId", "NeuronRecord", "Score"]  # met as values, made by nobody


def test_the_examples_of_the_page_run(
    run: cs.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.root.parents[2])
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(block, names)
    assert names["neuron"].text == "code and symbols"
    assert "layer 7: no such layer" in capsys.readouterr().out


def test_a_neuron_is_the_same_alone_and_among_its_layer(run: cs.Run) -> None:
    together = cs.Run(str(run.root)).neurons(1)
    assert [one.id.index for one in together] == list(range(6))
    assert [one.id.index for one in run.neurons(1, [4, 2])] == [4, 2]
    for one in together:
        alone = run.neuron(1, one.id.index)
        assert str(alone) == str(one) and len(alone.said) == len(one.said)


def test_a_neuron_knows_what_the_files_say(run: cs.Run) -> None:
    neuron, dead = run.neuron(0, 1), run.neuron(0, 5)
    rows = read_scores(run.scores("codes", "offline", "list-pmi"))
    rows = [row for row in rows if (row.neuron.layer, row.neuron.index) == (0, 1)]
    assert {row.control for row in rows} == {OWN, "shuffled", "empty", "unigram"}
    for row in rows:
        assert neuron.score(row.protocol, row.control, row.measure) == row.value
    assert neuron.score("no such protocol") is None and dead.score("random-only") is None
    assert dead.text == "" and dead.said[0].shown == "no explanation: dead neuron"
    assert dead.said[0].simulation.skipped == "dead neuron"


def test_a_neuron_knows_what_was_judged_and_said_from_each_set(run: cs.Run, tmp_path: Path) -> None:
    copy = cs.Run(shutil.copytree(run.root, tmp_path / "copy"))
    neuron = copy.neuron(0, 1).id
    judged = [Judgement(neuron, "detection", OWN, "months and dates", (0.9, 0.2), (True, False))]
    explained = Explained(copy, "codes", "offline", "top")
    explained.judgements("detection").write([judged])
    said = Explanation(neuron, "the sea", "offline", "words")
    dataclasses.replace(explained, set="anthropic").explanations.write([said])
    found = copy.neuron(0, 1)
    anthropic, top = found.said
    assert top.judgements == {"detection": judged} and anthropic.judgements == {}
    assert anthropic.text == "the sea" and anthropic.scores.protocols == []
    assert [one.set for one in copy.neuron(0, 2).said] == ["top"]
    for shown in (str(found), found._repr_html_()):
        assert "from anthropic" in shown and "from top" in shown


def test_a_card_shows_the_explanations_of_all_explainers_and_of_one_when_asked(run: cs.Run, tmp_path: Path) -> None:
    copy = cs.Run(shutil.copytree(run.root, tmp_path / "copy"))
    neuron = copy.neuron(0, 1).id
    by_terms = Explanation(neuron, "numbers (+10)", "terms", "english 1")
    Explained(copy, "codes", "terms", "top").explanations.write([by_terms])
    both = copy.neuron(0, 1)
    assert [said.explainer for said in both.said] == ["offline", "terms"]
    for shown in (str(both), both._repr_html_()):
        assert "months and dates" in shown and "by offline" in shown
        assert "numbers (+10)" in shown and "by terms" in shown
    alone = str(copy.neuron(0, 1, explainer="terms"))
    assert "numbers (+10)" in alone and "by terms" not in alone and "months and dates" not in alone


def test_a_neuron_shows_itself_in_a_terminal(run: cs.Run) -> None:
    neuron = run.neuron(0, 1)
    console = Console(file=io.StringIO(), width=100, color_system="truecolor", force_terminal=True)
    console.print(neuron)
    plain, same = (Console(file=io.StringIO(), width=100, color_system=None) for _ in range(2))
    plain.print(neuron)
    same.print(neuron_card(ShowConfig(run.root, 0, 1)))
    text = plain.file.getvalue()  # type: ignore[attr-defined]
    assert text == same.file.getvalue() and str(neuron) == text.rstrip("\n")  # type: ignore[attr-defined]
    assert "\x1b[" in console.file.getvalue() and "\x1b[" not in text  # type: ignore[attr-defined]
    assert repr(neuron) == "<Neuron 1 of layer 0, codes of crate-2l>"


def test_a_neuron_shows_itself_in_a_notebook(run: cs.Run) -> None:
    page = run.neuron(0, 1)._repr_html_()
    assert "months and dates" in page and "neuron <strong>1</strong>" in page and "layer 0 · codes · crate-2l" in page
    assert re.search(r"random-only <strong>[\d.]+</strong> \[[\d.]+, [\d.]+\] \(shuffled", page)
    assert page.count('class="row"') >= 4 and "True and simulated" in page
    assert "no explanation: dead neuron" in run.neuron(0, 5)._repr_html_()
    assert "rank" not in page and "<script" not in page
    # Its style reaches nothing else of the notebook.
    style = re.search(r"<style>(.*)</style>", page, re.S)
    assert style and all(rule.lstrip().startswith((".cratescope", "@media")) for rule in outermost(style[1]))


def outermost(style: str) -> Iterator[str]:
    """What stands before each brace that is inside no other."""
    depth, start = 0, 0
    for place, letter in enumerate(style):
        if letter == "{" and not depth:
            yield style[start:place]
        depth += (letter == "{") - (letter == "}")
        start = place + 1 if letter == "}" else start
    assert depth == 0


def test_all_that_a_notebook_shows_is_escaped(tmp_path: Path) -> None:
    made = fake_run(tmp_path / "<b>&", Fake(explanation=NASTY, layers=1))
    fake_tokenizer().save_pretrained(made.model)
    for index in range(5):
        page = made.neuron(0, index)._repr_html_()
        assert "<script" not in page and "<b>" not in page and "alert(" in page and "&lt;b&gt;&amp;" in page


def test_a_neuron_that_nobody_explained_has_a_card(tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare").neuron(0, 1)
    assert bare.said == () and bare.text == "" and "not explained" in str(bare)
    assert "not explained" in bare._repr_html_() and "top 1" in bare._repr_html_()


def test_what_is_not_there_is_named(run: cs.Run) -> None:
    for layer, index, options, words in (
        (7, 0, {}, "layer 7: no such layer"),
        (0, 6, {}, "no neuron 6"),
        (0, -1, {}, "no neuron -1"),
        (0, 0, {"site": "mlp"}, "no records of site mlp"),
    ):
        with pytest.raises(cs.UserError, match=words):
            run.neuron(layer, index, **options)
    with pytest.raises(cs.UserError, match="finish `cratescope train`"):
        run.load_model()


def test_a_damaged_simulation_is_named(run: cs.Run, tmp_path: Path) -> None:
    copy = cs.Run(shutil.copytree(run.root, tmp_path / "copy"))
    simulated = Explained(copy, "codes", "offline", "top").simulations("list-pmi")
    whole = simulated.read(0)
    short = {control: (rows[0][1:], *rows[1:]) for control, rows in whole[1].expected.items()}
    simulated.replace(0, [*(whole | {1: dataclasses.replace(whole[1], expected=short)}).values()])
    with pytest.raises(cs.UserError, match="layer-00.parquet: neuron 1 has more or fewer values than tokens"):
        copy.neuron(0, 1)


def test_a_run_is_a_value(run: cs.Run) -> None:
    same = cs.Run(str(run.root))
    assert same == run and hash(same) == hash(run) and pickle.loads(pickle.dumps(run)) == run
    assert same.tokenizer is same.tokenizer and repr(same) == f"Run(root={run.root!r})"
