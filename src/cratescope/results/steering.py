"""How well units steer a run's model, read from its sweeps: success at fixed KL, beside controls (docs/steering.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from cratescope.errors import UserError
from cratescope.files import Shape, read_json
from cratescope.neurons.curves import CONTROLS, NUMBERS, OWN, UNEDITED, Point, curves
from cratescope.results.estimates import NOTHING, Estimate, Values, gains, of_layer, of_model, over
from cratescope.results.runs import Results, Row, one_per_run
from cratescope.run import IDENTITY, Run

Kinds = Mapping[str, Sequence[Point]]
"""The points of one unit by kind, in the order of strengths."""
KLS = (0.1, 0.5, 1.0)
"""Nats per token at which success is read off; the primary measure's is the second."""
PRIMARY_KL, PRIMARY_MEASURE = 0.5, "mass"
MEASURES = ("mass", "logprob", "rate")
TARGETS, AIMS = "targets", "aims"
"""Whose tokens a control is measured on: the unit's, or those that its own direction raises most."""
AGAINST = (("random", AIMS), *((control, TARGETS) for control in CONTROLS))
"""Controls that gains are over; of the first the gain is primary."""
_TOKENS: Shape = [{"token": int, "text": str, "change": float, "plain": float, "steered": float}]
EXAMPLE: Shape = {
    **{"prompt": str, "edits": [str], "plain": str, "steered": str, "rises": _TOKENS, "likelier": _TOKENS},
    **{"kl_prompt": float, "kl_generated": float, "generated": int},
}
"""What is read of example.json."""
MAKER = "`cratescope steer --sweep`"


@dataclass(frozen=True, eq=False)
class Steering:
    """The sweep of one site of a run.

    mode: how edits of features are written back, `delta` or `replace`; empty for neurons. points: by layer and unit.
    example: the paper's, as of `Continuations`; None where there is none.
    """

    site: str
    mode: str
    points: Mapping[int, Mapping[int, Kinds]]
    example: Row | None

    @property
    def title(self) -> str:
        return f"{self.site}, {self.mode}" if self.mode else self.site

    def success(
        self, kl: float = PRIMARY_KL, measure: str = PRIMARY_MEASURE, kind: str = OWN, tokens: str = TARGETS
    ) -> Values:
        """By layer and unit, the rise of `measure` of these tokens at that KL (`at_kl`)."""
        name = f"aim_{measure}" if tokens == AIMS else measure

        def rise(point: Point) -> float:
            value: float = getattr(point, name)
            return value - getattr(point, f"{name}_plain", 0.0)

        return self._each(kind, lambda kinds: at_kl(_curve(kinds, kind, rise), kl, 0.0, _start(kinds, rise)))

    def _each(self, kind: str, value: Callable[[Kinds], float]) -> Values:
        """A value of every unit that has points of this kind."""
        return {
            layer: {index: value(kinds) for index, kinds in units.items() if kind in kinds}
            for layer, units in self.points.items()
        }

    def gain(
        self, kl: float = PRIMARY_KL, measure: str = PRIMARY_MEASURE, control: str = "random", tokens: str = AIMS
    ) -> Values:
        """The same less that of a control; by default the primary measure."""
        return gains(self.success(kl, measure), self.success(kl, measure, control, tokens))

    def reached(self, kl: float) -> float:
        """Share of units with a strength that reaches this KL."""
        units = [kinds[OWN] for layer in self.points.values() for kinds in layer.values()]
        return sum(max(point.kl for point in points) >= kl for points in units) / len(units)

    def written(self, name: str, kl: float = PRIMARY_KL) -> Values:
        """`nats` or `distinct` of the text that is written at that KL."""

        def value(kinds: Kinds) -> float:
            plain = getattr(kinds[OWN][0], f"{name}_plain")
            return at_kl(_curve(kinds, OWN, attrgetter(name)), kl, plain, _start(kinds, attrgetter(name)))

        return self._each(OWN, value)


def _curve(kinds: Kinds, kind: str, value: Callable[[Point], float]) -> list[tuple[float, float]]:
    return [(point.kl, value(point)) for point in kinds[kind]]


def _start(kinds: Kinds, value: Callable[[Point], float]) -> tuple[float, float] | None:
    """Where the curve begins that has no edit, but not at no cost."""
    return next(iter(_curve(kinds, UNEDITED, value)), None) if UNEDITED in kinds else None


def at_kl(
    curve: Iterable[tuple[float, float]], wanted: float, plain: float, start: tuple[float, float] | None = None
) -> float:
    """The value of a curve of (KL, value), in the order of strengths, where its KL first is `wanted`.

    It begins at (0, plain) unless there is another `start`, and is linear in sqrt(KL) between strengths. A curve that
    does not get as far has its last value; one that starts beyond has that of not steering, `plain`.
    """
    before, value = start or (0.0, plain)
    if before >= wanted:
        return plain
    for kl, found in curve:
        if kl >= wanted:
            low, high, middle = (math.sqrt(max(number, 0.0)) for number in (before, kl, wanted))
            return value + (found - value) * (middle - low) / (high - low)
        before, value = kl, found
    return value


def read_steering(run: Run) -> list[Steering]:
    """Every sweep of a run, its neurons first.

    Raises:
        UserError: a damaged file, or curves of another model.
    """
    folders = sorted(path.parent for path in (run.root / "steering").glob("*/manifest.json"))
    found = [_read(run, folder) for folder in folders]
    return sorted((one for one in found if one.points), key=lambda one: (bool(one.mode), one.site, one.mode))


def _read(run: Run, folder: Path) -> Steering:
    identity = read_json(folder / "manifest.json", IDENTITY, MAKER)["identity"]
    if run.model.is_dir() and identity.get("model_sha256") not in (None, run.fingerprint()):
        raise UserError(f"{folder}: curves of another model; delete it and run {MAKER}")
    example = folder / "example.json"
    kept = curves(folder)
    points = {layer: {index: _by_kind(items) for index, items in kept.read(layer).items()} for layer in kept.layers}
    return Steering(
        identity["site"],
        identity.get("sae", ""),
        {layer: units for layer, units in points.items() if units},
        read_json(example, EXAMPLE, MAKER) if example.exists() else None,
    )


def _by_kind(items: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for item in sorted(items, key=lambda item: item.strength):
        found.setdefault(item.kind, []).append(item)
    return found


Swept = tuple[Results, Steering]
"""A run, as one of its results says what it is, with one of its sweeps."""


def read_swept(results: Sequence[Results]) -> list[Swept]:
    """Every sweep of the runs that results are of. Errors as of `read_steering`."""
    return [(item, found) for item in one_per_run(results) for found in read_steering(item.run)]


def _about(item: Results, found: Steering) -> Row:
    about = {"model": item.run.name, "family": item.arm.family, "preset": item.arm.preset, "seed": item.arm.seed}
    return about | {"tokens_trained": item.arm.tokens_trained, "site": found.site, "mode": found.mode}


def success_rows(swept: Sequence[Swept]) -> list[Row]:
    """Success and gains with intervals: a row per sweep, KL, measure, control, and layer or mean of layers.

    over: the control that a gain is over; empty for success itself. tokens: those that the control is measured on.
    """
    return [
        row for item, found in swept for kl in KLS for measure in MEASURES for row in _rows(item, found, kl, measure)
    ]


def _rows(item: Results, found: Steering, kl: float, measure: str) -> Iterator[Row]:
    quantities = {("", TARGETS): found.success(kl, measure)}
    quantities |= {pair: found.gain(kl, measure, *pair) for pair in AGAINST}
    for (control, tokens), values in quantities.items():
        about = _about(item, found) | {"kl": kl, "reached": found.reached(kl), "measure": measure}
        about |= {"over": control, "tokens": tokens}
        for layer, row in values.items():
            yield about | {"layer": layer} | _numbers(of_layer(row))
        yield about | {"layer": "mean"} | _numbers(of_model(values))


def _numbers(estimate: Estimate) -> Row:
    return {name: getattr(estimate, name) for name in ("mean", "standard_error", "low", "high", "n")}


def curve_rows(swept: Sequence[Swept]) -> list[Row]:
    """The curves themselves, means over units: a row per sweep, layer, kind and strength."""
    return [
        _about(item, found)
        | {"layer": layer, "kind": kind, "n": len(points)}
        | {name: mean(points, name) for name in NUMBERS}
        for item, found in swept
        for layer, units in found.points.items()
        for (kind, _), points in sorted(_by_strength(units).items())
    ]


def mean(points: Sequence[Point], name: str) -> float:
    return math.fsum(getattr(point, name) for point in points) / len(points)


def _by_strength(units: Mapping[int, Kinds]) -> dict[tuple[str, float], list[Point]]:
    found: dict[tuple[str, float], list[Point]] = {}
    for kinds in units.values():
        for points in kinds.values():
            for point in points:
                found.setdefault((point.kind, point.strength), []).append(point)
    return found


def summary(swept: Sequence[Swept]) -> list[Row]:
    """What the report's table says of each sweep; estimates are over layers of units."""
    return [_summary(item, found, swept) for item, found in swept]


def _summary(item: Results, found: Steering, swept: Sequence[Swept]) -> Row:
    copy = untrained_sweep(item, found, swept)
    own = of_model(found.success())
    return {
        "item": item,
        "found": found,
        "success": {kl: of_model(found.success(kl)) for kl in KLS},
        "reached": {kl: found.reached(kl) for kl in KLS},
        "gains": {pair: of_model(found.gain(PRIMARY_KL, PRIMARY_MEASURE, *pair)) for pair in AGAINST},
        "untrained": over(own, of_model(copy.success())) if copy else NOTHING,
        "logprob": of_model(found.success(measure="logprob"), bounds=False),
        "rate": of_model(found.success(measure="rate"), bounds=False),
        "rate_gain": of_model(found.gain(measure="rate"), bounds=False),
        "nats": of_model(found.written("nats"), bounds=False),
        "distinct": of_model(found.written("distinct"), bounds=False),
        "n": own.n,
    }


def untrained_sweep(item: Results, found: Steering, swept: Sequence[Swept]) -> Steering | None:
    """The same sweep of the untrained copy of the run; None for one that is untrained itself."""

    def kind(one: Results, of: Steering) -> tuple[Any, ...]:
        return one.arm.preset, one.arm.name, one.arm.seed, of.site, of.mode

    copies = (of for one, of in swept if one.arm.untrained and kind(one, of) == kind(item, found))
    return None if item.arm.untrained else next(copies, None)
