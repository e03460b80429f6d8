"""Nearest units and twins for an export, found as the server finds them, but waited for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

from cratescope.errors import UserError
from cratescope.viewer.data import Library
from cratescope.viewer.loaded import Models
from cratescope.viewer.nearest import Nearest, Side
from cratescope.viewer.turns import Turns

Json = dict[str, Any]
NONE = "No nearest units were found when this page was exported; open the run with `cratescope view`."
"""Why there are none may name folders of the machine, which are nobody else's business."""


class Alike:
    """What `Nearest` finds of the runs that were opened."""

    def __init__(self, library: Library, models: Models) -> None:
        self.library = library
        self.found = Nearest(library.opened.values(), lambda: models, Turns())

    def nearest(self, run: str, site: str, layer: int, index: int) -> Json:
        """The nearest units of one."""
        opened = self.library.run_named(run)
        while "computing" in (found := self.found.of(opened, opened.site(site), layer, index)):
            time.sleep(0.1)
        return {"error": NONE} if "error" in found else found

    def twins(self) -> Iterator[tuple[list[str], list[str], Json]]:
        """The twins of every two sites of different runs that can be compared, with their names."""
        sides = [Side(opened, site) for opened in self.library.opened.values() for site in opened.sites.values()]
        for one, other in itertools.permutations(sides, 2):
            if one.opened is not other.opened and (found := self._twins(one, other)):
                yield [*one.key], [*other.key], found

    def _twins(self, one: Side, other: Side) -> Json | None:
        try:
            while (found := self.found.twins(one, other)) is None:
                time.sleep(0.1)
        except UserError:
            return None
        return found
