"""The viewer's data: JSON values built from run folders, for the server and for exported pages alike.

Units are addressed by (run, site, layer, index); a run by its name, which is looked up among the runs that were opened
and never used as a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import Any

from cratescope.errors import UserError
from cratescope.run import Run, versions
from cratescope.viewer import cards, home, table
from cratescope.viewer.opened import Opened

Json = dict[str, Any]
KEPT = 64
"""Cards that are kept."""


class Library:
    """The runs that were opened, and what the page asks of them. Safe to use from several threads."""

    def __init__(self, roots: Sequence[Path | str]) -> None:
        """Raises UserError: no run directory, or two of one name."""
        self.opened: dict[str, Opened] = {}
        for root in roots:
            one = Opened(Run(root))
            if one.name in self.opened:
                raise UserError(f"two run directories are called {one.name!r}; rename one")
            self.opened[one.name] = one
        self._lock = RLock()
        self._tables: dict[tuple[str, str], Json] = {}
        self._entries: dict[str, Json] = {}
        self._cards: dict[tuple[str, str, int, int], Json] = {}

    def run_named(self, name: str) -> Opened:
        """A run or milestone by its name. UserError: none of those that were opened is called so."""
        with self._lock:
            if found := self.opened.get(name):
                return found
            for one in self.opened.values():
                for milestone in one.life:
                    if milestone.name == name:
                        return milestone
        known = ", ".join(self.opened)
        raise UserError(f"no run {name!r:.80}; this viewer has {known}")

    def home(self) -> Json:
        """What the page opens with, but for the notes."""
        with self._lock:
            for name, one in self.opened.items():
                if name not in self._entries:
                    self._entries[name] = home.run_entry(one)
            names = ", ".join(self.opened)
            version = versions().get("cratescope", "")
            told = {name: {"problems": [*one.problems.values()]} for name, one in self.opened.items()}
            runs = [entry | told[name] for name, entry in self._entries.items()]
            return {"title": names, "version": version, "runs": runs}

    def table(self, run: str, site: str) -> Json:
        """All units of a site as columns."""
        opened = self.run_named(run)
        with self._lock:
            if (run, site) not in self._tables:
                self._tables[run, site] = table.table(opened, opened.site(site))
            return self._tables[run, site]

    def card(self, run: str, site: str, layer: int, index: int) -> Json:
        """Everything known of one unit; the last ones are kept, since pages ask again until neighbours are found."""
        with self._lock:
            key = run, site, layer, index
            found = self._cards.pop(key, None) or self.cards(run, site, layer, [index])[0]
            self._cards[key] = found
            if len(self._cards) > KEPT:
                self._cards.pop(next(iter(self._cards)))
            return found

    def cards(self, run: str, site: str, layer: int, indices: Sequence[int], choose: cards.Choose = list) -> list[Json]:
        """Everything known of several units of a layer, in this order; `choose` says which windows are shown."""
        opened = self.run_named(run)
        found = opened.site(site)
        with self._lock:
            made = [*cards.cards(opened, found, layer, indices, self.untrained_copy(opened), choose)]
            effects = cards.effects(found, layer, indices)
            for one in made:
                life = [self._life(milestone, site, layer, one["index"]) for milestone in opened.life]
                one |= {"effects": effects.get(one["index"]), "nearest": None, "life": [*filter(None, life)]}
        return made

    def untrained_copy(self, opened: Opened) -> Opened | None:
        """The same arm with the same seed, not trained, among the runs that were opened."""
        arm = opened.arm
        if arm.untrained:
            return None
        alike = (one for one in self.opened.values() if one.arm.untrained)
        kind = (arm.preset, arm.name, arm.seed)
        return next((one for one in alike if (one.arm.preset, one.arm.name, one.arm.seed) == kind), None)

    def _life(self, milestone: Opened, site: str, layer: int, index: int) -> Json | None:
        found = milestone.sites.get(site)
        return cards.life_entry(milestone, found, layer, index) if found and layer in found.layers else None
