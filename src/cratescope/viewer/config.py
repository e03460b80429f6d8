"""Settings of `view`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cratescope.errors import UserError
from cratescope.options import Checked, PositionalPaths, within

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = 8642
"""Where a viewer is unless another stands there: links that were kept go on leading somewhere."""
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class ViewConfig(Checked):
    """Look around in one or several runs in the browser: neurons, live text, steering, comparison."""

    runs: PositionalPaths
    """Run directories."""
    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own needs --token."""
    port: Annotated[int | None, within(0, 65_535)] = None
    """Port to listen on, 0 for any free one; by default 8642, or any free one if that is taken."""
    token: str | None = None
    """A word of at least 16 characters that a browser has to show once, as in the address that is printed."""
    open: bool = False
    """Open the page in the browser."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Device to run the models on."""
    export: Path | None = None
    """Write the same pages into this folder instead, to be opened from disk or put on any web server."""
    model: bool = True
    """Put small models into the exported pages, so that they have live text and steering."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise UserError("runs: name at least one, such as `cratescope view runs/crate-2l`")
        if self.host not in LOOPBACK and self.token is None:
            raise UserError(f"--host {self.host}: others could reach it; give --token, a long secret word, besides")
        if self.token is not None and (len(self.token) < SHORTEST_TOKEN or not self.token.isascii()):
            raise UserError(f"--token: give at least {SHORTEST_TOKEN} letters and digits")
