"""Explanations, simulations and judgements, and the tables they are kept in (docs/records.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from cratescope.errors import UserError
from cratescope.neurons.kept import Kept, item_of, neuron_id, row_of, schema
from cratescope.neurons.records import NeuronId
from cratescope.parts import Row, Tables
from cratescope.run import claim


@dataclass(frozen=True)
class Explanation:
    """One phrase that says what a neuron finds; `prompt` names the prompt that asked for it.

    skipped: why `text` is empty, such as "dead neuron"; None when there is a text.
    """

    neuron: NeuronId
    text: str
    explainer: str
    prompt: str
    skipped: str | None = None


@dataclass(frozen=True)
class Simulation:
    """Activations predicted from a text alone, by control: a row for each window of `keys`.

    texts: what each control was simulated from. "none" is the neuron's own explanation, "shuffled" another neuron's,
    "empty" a sentence that says nothing, "unigram" no text at all (its strongest tokens stand there): the mean
    activation of each token in the windows explained from. A control that the neuron cannot have is missing.
    expected: one list of numbers a window, one a token, on the simulator's own scale (a correlation does not mind).
    skipped: why there is nothing, such as "dead neuron".
    """

    neuron: NeuronId
    simulator: str
    texts: dict[str, str]
    keys: tuple[tuple[int, int, int], ...]
    expected: dict[str, tuple[tuple[float, ...], ...]]
    skipped: str | None = None


@dataclass(frozen=True)
class Judgement:
    """What an LLM answered about single windows: the probability of yes, and whether yes was right.

    control: as in Simulation, "none" or "shuffled". Scorer "intruder" needs no text: its windows come in groups of
    INTRUDER_GROUP, one of which is foreign (label true), and the probabilities of a group add up to 1.
    """

    neuron: NeuronId
    scorer: str
    control: str
    text: str
    probabilities: tuple[float, ...]
    labels: tuple[bool, ...]
    skipped: str | None = None


INTRUDER_GROUP = 5
"""Windows shown at a time by intruder detection, one of them foreign."""


_KEY = pa.struct([("excerpt", pa.int32()), ("start", pa.int32()), ("width", pa.int32())])


_EXPLANATION = schema(
    ("text", pa.string()), ("explainer", pa.string()), ("prompt", pa.string()), ("skipped", pa.string())
)


_SIMULATION = schema(
    ("simulator", pa.string()),
    ("control", pa.string()),
    ("text", pa.string()),
    ("windows", pa.list_(_KEY)),
    ("simulated", pa.list_(pa.list_(pa.float64()))),
    ("skipped", pa.string()),
)


_JUDGEMENT = schema(
    ("scorer", pa.string()),
    ("control", pa.string()),
    ("text", pa.string()),
    ("probabilities", pa.list_(pa.float64())),
    ("labels", pa.list_(pa.bool_())),
    ("skipped", pa.string()),
)


def explanations(folder: Path) -> Kept[Explanation]:
    """One row per neuron."""
    return Kept(
        Tables(folder, _EXPLANATION, "explain"), lambda item: [row_of(item)], lambda rows: item_of(Explanation, rows[0])
    )


def simulations(folder: Path) -> Kept[Simulation]:
    """One row per neuron and control; a neuron that nothing was simulated for has one without a control."""
    return Kept(Tables(folder, _SIMULATION, "simulate", ("index", "control")), _simulation_rows, _simulation)


def _simulation_rows(item: Simulation) -> list[Row]:
    windows = [{"excerpt": excerpt, "start": start, "width": width} for excerpt, start, width in item.keys]
    about = vars(item.neuron) | {"simulator": item.simulator, "skipped": item.skipped, "windows": windows}
    return [
        about | {"control": control, "text": text, "simulated": item.expected.get(control)}
        for control, text in item.texts.items()
    ] or [about | {"control": None, "text": None, "simulated": None}]


def _simulation(rows: list[Row]) -> Simulation:
    first = rows[0]
    keys = tuple((key["excerpt"], key["start"], key["width"]) for key in first["windows"])
    told = [row for row in rows if row["control"] is not None]
    return Simulation(
        neuron_id(first),
        first["simulator"],
        {row["control"]: row["text"] for row in told},
        keys,
        {row["control"]: tuple(map(tuple, row["simulated"])) for row in told if row["simulated"] is not None},
        first["skipped"],
    )


def judgements(folder: Path) -> Kept[list[Judgement]]:
    """One row per neuron and control."""
    return Kept(
        Tables(folder, _JUDGEMENT, "judge", ("index", "control")),
        lambda items: [row_of(item) for item in items],
        lambda rows: [item_of(Judgement, _as_tuples(row)) for row in rows],
    )


def _as_tuples(row: Row) -> Row:
    return row | {name: tuple(row[name]) for name in ("probabilities", "labels")}


Result = TypeVar("Result")


def claim_and_keep(folder: Path, identity: dict[str, Any], keep: Callable[[Result], None], item: Result) -> None:
    """Keep a result in a folder that is claimed with the first one.

    Not before: a model or server that gives no answer leaves no folder, and after a stop with advice another
    --llm-max-tokens is free to start.
    """
    claim(folder, identity)
    keep(item)


class Waiting(Generic[Result]):
    """Results that tell only of refusals and useless answers wait until something was answered.

    A wrong option, or too few tokens, spoils every answer; it must not be written as that many skipped neurons.
    """

    def __init__(self, write: Callable[[Result], None], enough: int) -> None:
        self._write, self._enough = write, enough
        self._results: list[Result] = []
        self._problems: list[UserError] = []
        self.answered = False

    def add(self, result: Result, problem: UserError | None) -> None:
        """Write, or keep, what is known of a neuron. Raises the first problem when there are enough and no answer."""
        self._results.append(result)
        self._problems += [problem] if problem else []
        if self.answered:
            self._flush()
        elif len(self._problems) >= self._enough:
            raise self._problems[0]

    def end(self, answered_before: Callable[[], bool]) -> None:
        """Write what waits. Raises the first problem when nothing was ever answered."""
        if self._problems and not self.answered and not answered_before():
            raise self._problems[0]
        self._flush()

    def _flush(self) -> None:
        for result in self._results:
            self._write(result)
        self._results = []
