"""The card in the terminal: it says what the files say, keeps to the width, and shades only where there is colour."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from cratescope import cli
from cratescope.errors import UserError
from cratescope.explain.controls import OWN
from cratescope.explain.protocols import ON_UNIFORM_TEXT
from cratescope.neurons.records import layer_file, read_records
from cratescope.report.card import neuron_card, shade
from cratescope.report.config import ShowConfig
from cratescope.report.text import number, visible
from cratescope.results.scores import Scores
from cratescope.run import Run
from fake_run import Fake, fake_run, fake_tokenizer
from kept_files import read_scores
from test_explain import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = fake_run(tmp_path_factory.mktemp("show") / "crate", Fake())
    fake_tokenizer().save_pretrained(run.model)
    return run


def shown(run: Run, layer: int = 0, neuron: int = 1, width: int = 100, colour: bool = False, **changes: Any) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(neuron_card(ShowConfig(run.root, layer, neuron, **changes)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_card_says_what_the_files_say(run: Run) -> None:
    text = shown(run)
    record = read_records(layer_file(run.records("codes"), 0), [1])[1]
    scores = read_scores(run.scores("codes", "offline", "list-pmi"))
    [own] = [
        score.value
        for score in scores
        if score.neuron == record.neuron
        and (score.protocol, score.control, score.measure) == ("random-only", OWN, "pearson")
    ]
    assert "crate · codes · layer 0 · neuron 1" in text and "months and dates" in text
    assert re.search(rf"random-only {100 * own:.1f} \[.*\] · shuffled", text)
    for name in ON_UNIFORM_TEXT:
        [row] = [row for row in scores if (row.neuron, row.control, row.measure) == (record.neuron, OWN, name)]
        assert f"{name} {number(row.value)} [{number(row.low)}, {number(row.high)}]" in text
    for value in (record.moments.mean, record.moments.variance, record.moments.maximum):
        assert f"{value:.4g}" in text
    assert f"active {100 * record.density:.1f} %" in text and "10,000" in text
    assert "\u00a0" not in text  # docs/first_neuron.md shows what is printed, and it can be copied
    assert [len(re.findall(label, text)) for label in ("top 5", "top 6", r"│ random +\d")] == [1, 0, 3]
    assert "from 2 " in text and "█" in text and "top tokens" in text and "bottom tokens" in text


def test_a_measure_without_a_value_is_shown_with_its_reason(run: Run) -> None:
    neuron = run.neuron(0, 1)
    [own] = [own for own, _ in neuron.said[0].scored(neuron.id) if own.protocol == "random-only"]
    rows = {row.measure: row for row in neuron.said[0].beside(own)}
    assert [*rows] == [*ON_UNIFORM_TEXT]
    missing = dataclasses.replace(rows["unseen"], value=None, low=None, high=None, reason="no unseen word")
    said = dataclasses.replace(neuron.said[0], scores=Scores([own, rows["balanced"], missing]))
    assert [row.measure for row in said.beside(own)] == ["balanced", "unseen"]
    silent = dataclasses.replace(own, value=None, reason="no unseen word")
    assert [row.measure for row in said.beside(silent)] == ["balanced"], "the same reason is not said twice"
    text = str(dataclasses.replace(neuron, said=(said,)))
    assert "· unseen – (no unseen word)" in text and "specific" not in text


@pytest.mark.parametrize("width", [50, 80, 200])
def test_no_line_is_wider_than_the_terminal(run: Run, width: int) -> None:
    lines = shown(run, width=width).splitlines()
    assert max(map(cell_len, lines)) == width


def test_tokens_are_shaded_by_activation_where_there_is_colour(run: Run) -> None:
    coloured = shown(run, width=500, colour=True)
    assert "\x1b[" not in shown(run) and "\x1b[" in coloured
    top = read_records(layer_file(run.records("codes"), 0), [1])[1].top[0]
    strongest = top.cut(32).activations.argmax()
    token = fake_tokenizer().decode([top.tokens[strongest]])
    assert re.search(rf"48;2;255;150;30m *{re.escape(token.strip())}", coloured)


def test_shades_rise_with_the_activation() -> None:
    shades = [shade(value, 4.0).bgcolor for value in (0.1, 1.0, 3.0, 4.0, 9.0)]
    reds = [colour.triplet.red for colour in shades]
    assert reds == sorted(reds) and reds[0] < reds[2] and reds[-1] == 255
    assert all(shade(value, peak).bgcolor is None for value, peak in ((0.0, 4.0), (-1.0, 4.0), (1.0, 0.0)))


def test_a_dead_neuron_and_one_without_explanation_have_a_card(run: Run, tmp_path: Path) -> None:
    dead = shown(run, neuron=5)
    assert "no explanation: dead neuron" in dead and "never" in dead and "top 1" not in dead
    bare = shown(make_run(tmp_path / "bare"))
    assert "not explained" in bare and "█" not in bare and "top 1" in bare
    assert "not explained" in shown(run, explainer="another")


def test_line_breaks_and_tabs_in_tokens_are_seen(run: Run) -> None:
    cards = "".join(shown(run, layer, neuron, width=300) for layer in (0, 1) for neuron in range(5))
    assert "↵" in cards and "⇥" in cards and "\t" not in cards


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": 7}, "layer 7: no such layer; .* has layers 0, 1"),
        ({"neuron": 6}, "no neuron 6; this layer has neurons 0 to 5"),
        ({"site": "mlp"}, "no records of site mlp"),
    ],
)
def test_what_is_not_there_is_named(run: Run, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        shown(run, **changes)
    with pytest.raises(UserError, match="not a run directory"):
        neuron_card(ShowConfig(run.root / "nowhere", 0, 0))


def test_the_command_prints_without_colour_into_a_pipe(run: Run) -> None:
    text = cli.run(["show", str(run.root), "1", "2"])
    assert "layer 1 · neuron 2" in text and "\x1b[" not in text


def test_show_loads_no_torch_no_models_and_no_figures(run: Run) -> None:
    code = f"import sys; from cratescope import cli; cli.run(['show', {str(run.root)!r}, '1', '2']); "
    code += "print([m for m in ('torch', 'scipy', 'matplotlib', 'transformers.models.auto') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout.strip() == "[]", told.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "backslashreplace"])
def test_a_terminal_of_any_encoding_gets_the_card(
    run: Run, encoding: str, errors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        cli.run_and_exit(["show", str(run.root), "0", "1"])
        with pytest.raises(SystemExit):
            cli.run_and_exit(["show", str(run.root / "caf\udce9 \u2588"), "0", "1"])
    for stream in (out, err):
        stream.flush()
    shown = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "months and dates" in shown and ("█" in shown) == (encoding == "utf-8")
    assert err.buffer.getvalue().startswith(b"cratescope: ")  # type: ignore[attr-defined]


def test_what_steers_a_terminal_is_shown_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible("a\x9b31m\u202eb\x1b") == "a⟨009B⟩31m⟨202E⟩b␛"
    assert visible("\xa0\u3000") == "⟨00A0⟩⟨3000⟩" and visible("a\xa0") == "a\xa0"
    with pytest.raises(SystemExit):
        cli._fail("no such file \x1b]0;name\x07")
    assert capsys.readouterr().err == "cratescope: no such file ?]0;name?\n"
