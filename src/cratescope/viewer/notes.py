"""Notes and bookmarks of units, in `notes.json` of their run."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from threading import RLock
from typing import Any

from cratescope.errors import UserError
from cratescope.files import SURROGATES, misfit, read_json, write_json
from cratescope.locks import locked
from cratescope.viewer.opened import Opened

FILE = "notes.json"
LONGEST_NOTE = 10_000
MOST_NOTES = 20_000
"""Per run; the file is read and written as a whole."""
NOTE = {"text": str, "bookmarked": bool, "changed": str}
REQUEST = {"run": str, "site": str, "layer": int, "index": int, "text?": str, "bookmarked?": bool}


class Notes:
    """Read from the file each time, so that several viewers and an editor may write it."""

    def __init__(self) -> None:
        self._lock = RLock()

    def of(self, opened: Opened) -> dict[str, Any]:
        """By `run/site/layer/index`. UserError: the file is damaged."""
        found = self._read(opened)
        return {f"{opened.name}/{key}": note for key, note in found.items()}

    def write(self, opened: Opened, request: Mapping[str, Any]) -> dict[str, Any]:
        """Change a unit's note, and give it; what the request leaves out stays, and an empty note is removed.

        Raises:
            UserError: not of the shape `REQUEST`, no such unit, a text that is too long, or a folder that cannot be
                written to.
        """
        key = self._key(opened, request)
        if not opened.run.root.is_dir():
            raise UserError(f"{opened.name}: its folder is gone; start the viewer again")
        with self._lock, locked(opened.run.root, "notes", wait=True):
            notes = self._read(opened)
            before = notes.pop(key, {"text": "", "bookmarked": False})
            changed = {name: request[name] for name in ("text", "bookmarked") if name in request}
            note = before | changed | {"changed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            if note["text"] or note["bookmarked"]:
                notes[key] = note
            if len(notes) > MOST_NOTES:
                raise UserError(
                    f"{opened.name} has {MOST_NOTES:,} notes, the most that there can be; delete some first"
                )
            write_json(opened.run.root / FILE, dict(sorted(notes.items())))
        return note

    def _read(self, opened: Opened) -> dict[str, Any]:
        path = opened.run.root / FILE
        return read_json(path, {str: NOTE}, "nothing: make the notes") if path.exists() else {}

    def _key(self, opened: Opened, request: Mapping[str, Any]) -> str:
        text = request.get("text", "")
        if len(text) > LONGEST_NOTE:
            raise UserError(f"a note of {len(text):,} characters; give at most {LONGEST_NOTE:,}")
        if SURROGATES.search(text) or re.search("\0", text):
            raise UserError("a note with characters that no file can hold; leave them out")
        site = opened.site(request["site"])
        if site.units(request["layer"]).place(request["index"]) is None:
            raise UserError(
                f"{opened.name} {site.name}: no record of neuron {request['index']} of layer {request['layer']}"
            )
        return f"{site.name}/{request['layer']}/{request['index']}"


def checked(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request itself. UserError: it is not of the shape `REQUEST`."""
    if wrong := misfit(request, REQUEST, "the request"):
        raise UserError(f"{wrong}; send run, site, layer, index, text and bookmarked")
    return request
