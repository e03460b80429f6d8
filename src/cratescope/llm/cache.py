"""Cache of server answers on disk, so that none is paid for twice: one SQLite file for all runs."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cratescope.errors import UserError

WAIT = 60.0
"""Seconds to wait for another process that is writing."""


class AnswerCache:
    """A table of request -> answer. Every answer is one transaction, so a kill loses no stored answer.

    It is in $CRATESCOPE_CACHE, not in a run directory: runs of one study ask the same (controls, generic lists), and
    repeating a deleted run should cost nothing. SQLite's locks make it safe for several workers
    on one machine.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def find(self, requests: Sequence[dict[str, Any]]) -> list[Any]:
        """Look up the stored answer of every request, None where there is none."""
        with self._open() as database:
            ask = "SELECT answer FROM answers WHERE request = ?"
            rows = [database.execute(ask, (_key(request),)).fetchone() for request in requests]
            return [row and json.loads(row[0]) for row in rows]

    def store(self, request: dict[str, Any], answer: Any) -> None:
        with self._open() as database:
            database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (_key(request), json.dumps(answer)))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open a connection whose changes are committed when the block ends without an error."""
        try:
            with closing(sqlite3.connect(self._path, timeout=WAIT)) as database, database:
                yield database
        except (sqlite3.Error, json.JSONDecodeError) as error:
            raise UserError(
                f"{self._path}: the cache of answers cannot be used ({error}); delete it (its answers are asked for "
                "again then), or name another folder in CRATESCOPE_CACHE"
            ) from error


def _key(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
