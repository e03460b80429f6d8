"""Options of commands: ranges, one check of all values, and settings made from a command line or a TOML table."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from cratescope.errors import UserError
from cratescope.workers import rank, worker_of

Config = TypeVar("Config", bound="Checked")
LARGEST = 2**31 - 1
LARGEST_SEED = 2**32 - 1
"""The largest that NumPy, PyTorch and transformers all accept."""
LARGEST_BATCH = 65_536


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high` without nan and inf; `above` and `below` leave out the ends."""

    low: float
    high: float
    above: bool
    below: bool

    def refusal(self, number: float) -> str | None:
        """The requirement that a number does not meet; None if it is in the range."""
        if not (number > self.low if self.above else number >= self.low):  # also when it is nan
            return f"more than {self.low}" if self.above else f"{self.low} or more"
        if not (number < self.high if self.below else number <= self.high):
            return f"less than {self.high}" if self.below else f"{self.high} or less"
        return None

    def __call__(self, default: str) -> str:
        """The note after an option in --help."""
        low = f"more than {self.low}" if self.above else f"{self.low} or more"
        high = f", {'less than ' if self.below else 'up to '}{self.high}" if self.high != LARGEST else ""
        return f"({low}{high}; default: {default})"


def within(
    low: float, high: float = LARGEST, *, above: bool = False, below: bool = False, help: str | None = None
) -> Any:
    """The range of an option of numbers, to stand in its annotation; of a tuple that of each number in it."""
    return tyro.conf.arg(help_behavior_hint=Range(low, high, above, below), help=help)


@functools.cache
def ranges(kind: type) -> dict[str, Range]:
    """Range of every option of numbers of a class of settings."""
    hints = get_type_hints(kind, include_extras=True).items()
    found = {name: [getattr(part, "help_behavior_hint", None) for part in get_args(hint)[1:]] for name, hint in hints}
    return {name: part for name, parts in found.items() for part in parts if isinstance(part, Range)}


@dataclass(frozen=True)
class Checked:
    """Settings that refuse what is out of its option's range, and text that no file can hold, when they are made."""

    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Changed defaults of the other options, by the value of an option `budget`."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for option in fields(kind):
            value = getattr(self, option.name)
            for one in value if isinstance(value, tuple) else (value,):
                reason = _refusal(one, option.default, ranges(kind).get(option.name))
                if reason:
                    shown = f" {one!s:.60}" if one != "" else ""
                    raise UserError(f"{self._flag(option.name)}{shown}: {reason}")
            if value == () and option.default not in ((), MISSING):
                raise UserError(f"{self._flag(option.name)}: name at least one")
        worker_of(getattr(self, "worker", "auto"))
        rank(local=True)  # what a launcher of processes says is checked here too
        gpus = getattr(self, "ray_gpus", 0)
        if gpus > 1 and gpus % 1:
            raise UserError(f"--ray-gpus {gpus}: Ray shares out parts of one GPU, or whole ones; give a whole number")

    @classmethod
    def _flag(cls, name: str) -> str:
        """Name of the option on the command line."""
        positional = tyro.conf.Positional in get_args(get_type_hints(cls, include_extras=True)[name])
        return name if positional else f"--{name.removesuffix('_').replace('_', '-')}"


def _refusal(value: Any, default: Any, span: Range | None) -> str | None:
    """Why an option cannot have this value, if so."""
    if span and isinstance(value, int | float):
        reason = span.refusal(value)
        return reason and f"has to be {reason}"
    if isinstance(value, str) and not value and default != "":
        return "is empty; give a value or leave it out"
    if isinstance(value, str | Path) and re.search("[\0\ud800-\udfff]", str(value)):
        return "is not UTF-8 text without NUL; give another name"
    return None


MAY_BE_EMPTY = ("--llm-model", "--llm-tokenizer")
"""An empty path would be the folder that one is in, and nearly always is a variable that was not set."""


def _refuse_empty(arguments: list[str]) -> None:
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name = before if before.startswith("--") else "an argument"
        if re.fullmatch("--[a-z_-]+=", argument):
            name, argument = argument[:-1], ""
        if not argument and name not in MAY_BE_EMPTY:
            raise UserError(f"{name}: is empty; give a value or leave it out")


def parse(kind: type[Config], arguments: list[str], prog: str | None = None) -> Config:
    """Settings of `kind` from command-line arguments; `--budget` of training chooses the defaults of the others.

    Ends the process as a command line does: exit code 0 after --help, 2 for what cannot be parsed.
    """
    default: Any = tyro.MISSING_NONPROP
    _refuse_empty(arguments)
    words = [word for argument in arguments for word in argument.split("=", 1 if argument[:9] == "--budget=" else 0)]
    if "--budget" in words[:-1]:
        budget = words[len(words) - words[::-1].index("--budget")]
        if changed := kind.budgets.get(budget):
            default = kind(**dict.fromkeys(_required(kind), tyro.MISSING), **changed, **{"budget": budget})
    return tyro.cli(kind, prog=prog, args=arguments, default=default)


def from_table(kind: type[Config], table: Mapping[str, Any], where: str) -> Config:
    """Settings of `kind` from options by name, as TOML has them; those of nested settings stand beside the others.

    Raises:
        UserError: an unknown or missing option, or a value of another type or range; `where` begins the message.
    """
    hints = option_types(kind)
    values: dict[str, Any] = {}
    for name, value in table.items():
        name = f"{name}_" if f"{name}_" in hints else name  # what Python has as a word of its own
        if name not in hints:
            raise UserError(f"{where} has no option {name!r:.60}; see `cratescope <section> --help`")
        try:
            values[name] = _typed(value, hints[name])
        except ValueError as error:
            raise UserError(f"{where} {name} = {value!r:.60} is not a value it takes") from error
    if missing := [name for name in _required(kind) if name not in values]:
        raise UserError(f"{where} {missing[0]} is missing")
    values = {**kind.budgets.get(values.get("budget", ""), {}), **values}
    try:
        for name, group in _nested(kind).items():
            of_group = [option.name for option in fields(group) if option.name in values]
            values[name] = group(**{option: values.pop(option) for option in of_group})
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where} {error}") from error


def option_types(kind: type[Checked]) -> dict[str, Any]:
    """Type of every option of a class of settings, those of settings nested in it among them."""
    hints, nested = get_type_hints(kind), _nested(kind)
    found = {option.name: hints[option.name] for option in fields(kind) if option.name not in nested}
    for group in nested.values():
        found |= option_types(group)
    return found


def _nested(kind: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(hint)}


def _required(kind: type[Checked]) -> list[str]:
    return [option.name for option in fields(kind) if option.default is option.default_factory is MISSING]


def _typed(value: Any, hint: Any) -> Any:
    """A value of a TOML file as an option of this type has it, or ValueError; one value stands for a list of one."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is types.UnionType:  # with None, which TOML does not have
        return _typed(value, next(part for part in parts if part is not types.NoneType))
    if origin is tuple:
        several = list(value) if isinstance(value, list | tuple) else [value]
        kinds = parts[:1] * len(several) if parts[-1] is ... else parts
        return tuple(_typed(one, part) for one, part in zip(several, kinds, strict=True))
    if origin is dict and isinstance(value, dict):
        if all(isinstance(one, str | int | float) for one in value.values()):
            return {name: str(one) for name, one in value.items()}
        raise ValueError
    if hint is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if origin is Literal and isinstance(value, str) and value in parts or hint in (str, bool) and type(value) is hint:
        return value
    if hint is int and type(value) is int and abs(value) < 2**63:  # as TOML has it
        return value
    raise ValueError


PositionalPath = Annotated[Path, tyro.conf.Positional]
PositionalPaths = Annotated[tuple[Path, ...], tyro.conf.Positional]
WORKER = "i/n: do every n-th batch or part from the i-th on, i from 0; auto reads torchrun's RANK and WORLD_SIZE."
RAY = "Do it in this many Ray tasks, on a cluster or here (pip install 'cratescope[ray]'); each is one worker."
Site = Annotated[str, tyro.conf.arg(help="Site of the records, as given to `collect`.")]
# Options of every stage whose work is shared out. A base class would put them first in --help.
Worker = Annotated[str, tyro.conf.arg(help=WORKER)]
RayTasks = Annotated[int, within(0, 10_000, help=RAY)]
RayGPUs = Annotated[float, within(0, 1000, help="GPUs of a Ray task; 0.5 lets two share one.")]
