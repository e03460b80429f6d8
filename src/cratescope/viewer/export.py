"""An export: the viewer's pages in a folder, with their data in scripts, to be opened from disk or any web server.

data/manifest.js says what there is; every other script of data hands a gzip of JSON, or of float16 numbers, to the
page (page/shards.js).
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cratescope.errors import UserError
from cratescope.files import atomic_folder, write_text
from cratescope.progress import progress
from cratescope.viewer.alike import Alike
from cratescope.viewer.config import ViewConfig
from cratescope.viewer.data import Library
from cratescope.viewer.inside import ModelScripts
from cratescope.viewer.loaded import Models
from cratescope.viewer.opened import Opened, OpenedSite
from cratescope.viewer.packed import Address, Json, Packer, Scripts, Words, compact, few, narrow, words_of
from cratescope.viewer.sizes import unit_sizes

PAGE = Path(__file__).with_name("page")
INSIDE = ("tokenizer.js", "model.js", "steering.js", "shards.js", "ranking.js", "inside.js", "exported.js")
"""Scripts that only an export needs; they stand after data.js."""
SHARD = 64
"""Units in one script."""
AT_ONCE = 512
"""Units read at a time."""
POSTINGS = 1 << 17
"""Units named in one script of words."""
MANIFEST = Path("data") / "manifest.js"
OPENING = "window.CRATESCOPE_EXPORT = "
OURS = {"index.html", "page", "data"}
CHARSET = '<meta charset="utf-8">\n'
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
"""What a browser lets an exported page do, whatever its host says: it can ask for nothing but its own files."""


def export(config: ViewConfig) -> Path:
    """Write the pages of some runs and return the page's path.

    Raises:
        UserError: a folder that holds something else, or a run that cannot be read.
    """
    assert config.export is not None
    check_free(config.export)
    library, models = Library(config.runs), Models(config.device)
    with atomic_folder(config.export) as new:
        write_page(new)
        Export(library, models, Scripts(new / "data"), config.model).write(new / MANIFEST)
    return config.export / "index.html"


def check_free(folder: Path) -> None:
    """UserError: there is something that is no earlier export, or stands beside one: it would be lost."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if (folder.exists() and not folder.is_dir()) or (there and not (there <= OURS and _is_export(folder))):
        raise UserError(f"--export {folder}: there is something else than an earlier export; name a new folder")


def _is_export(folder: Path) -> bool:
    manifest = folder / MANIFEST
    return manifest.is_file() and manifest.read_bytes().startswith(OPENING.encode())


def write_page(folder: Path) -> None:
    """The same page as the server's, with the scripts of an export."""
    shutil.copytree(PAGE, folder / "page", ignore=shutil.ignore_patterns("index.html", ".*"))
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    names = [*(f"page/{name}" for name in INSIDE), MANIFEST.as_posix()]
    scripts = "".join(f'<script src="{name}"></script>\n' for name in names)
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    for place, more in ((CHARSET, policy), ('<script src="page/data.js"></script>\n', scripts)):
        assert place in text, place
        text = text.replace(place, place + more)
    write_text(folder / "index.html", text)


class Export:
    """Writes the data of an export.

    units: the number of every unit, in the order of runs, sites, layers. index: units by the words in their windows,
    those that have one near a peak and the others.
    """

    def __init__(self, library: Library, models: Models, scripts: Scripts, model: bool) -> None:
        self.library, self.models, self.scripts, self.model = library, models, scripts, model
        self.alike = Alike(library, models)
        self.units: dict[Address, int] = {}
        for opened in library.opened.values():
            for site in opened.sites.values():
                for layer in site.layers:
                    for index in site.units(layer).index.tolist():
                        self.units[opened.name, site.name, layer, index] = len(self.units)
        self.index: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))

    def write(self, manifest: Path) -> None:
        runs = [self._run(opened) for opened in self.library.opened.values()]
        home = self.library.home() | {"notes": {}}
        for run, entry in zip(runs, home["runs"], strict=True):
            entry["model"]["can_run"] = True if isinstance(run["model"], dict) else run["model"]
        about = {"version": home["version"], "home": self.scripts.put(home, "home"), "runs": runs}
        about |= {"search": self._words(), "twins": [*self._twins()]}
        write_text(manifest, f"{OPENING}{compact(about)};\n")

    def _run(self, opened: Opened) -> Json:
        words = Words()
        sites = [self._site(opened, site, words) for site in opened.sites.values()]
        return {
            "name": opened.name,
            "sites": sites,
            "words": self.scripts.put([*words.numbers], "words", opened.name),
            "model": self._model(opened),
        }

    def _model(self, opened: Opened) -> Json | str:
        """The model for the page, or why the page has none."""
        if not self.model:
            return "This page was exported without its models; open the run with `cratescope view`."
        return ModelScripts.of(self.scripts, opened, self.models)

    def _site(self, opened: Opened, site: OpenedSite, words: Words) -> Json:
        name = opened.name, site.name
        table = self.library.table(*name)
        first = self.units[*name, table["layer"][0], table["index"][0]] if table["index"] else len(self.units)
        layers = [self._layer(opened, site, layer, words) for layer in site.layers]
        return {"name": site.name, "first": first, "table": self.scripts.put(table, "table", *name), "layers": layers}

    def _layer(self, opened: Opened, site: OpenedSite, layer: int, words: Words) -> Json:
        indices = site.units(layer).index.tolist()
        name = opened.name, site.name, layer
        shards: list[Json] = []
        for cards in progress(self._cards(*name, indices), " ".join(map(str, name)), -(-len(indices) // SHARD)):
            packer = Packer(words, self.units)
            packed = {card["index"]: packer.pack(card) for card in cards}
            value = {"edges": [*packer.edges], "cards": packed}
            number = f"{len(shards):02d}"
            shards.append({"name": self.scripts.put(value, "cards", *name, number), "first": cards[0]["index"]})
        units = self.scripts.put(unit_sizes(site, layer, indices), "units", *name)
        return {"layer": layer, "units": units, "shards": shards}

    def _cards(self, run: str, site: str, layer: int, indices: Sequence[int]) -> Iterator[list[Json]]:
        """Cards of a layer, as many at a time as go into one script; their words are added to the index."""
        for start in range(0, len(indices), AT_ONCE):
            cards = self.library.cards(run, site, layer, indices[start : start + AT_ONCE], few)
            for place in range(0, len(cards), SHARD):
                some = [narrow(card) for card in cards[place : place + SHARD]]
                for card in some:
                    card["nearest"] = self.alike.nearest(run, site, layer, card["index"])
                    self._add_words(card)
                yield some

    def _add_words(self, card: Json) -> None:
        unit = self.units[card["run"], card["site"], card["layer"], card["index"]]
        for place, words in enumerate(words_of(card)):
            for word in words:
                self.index[word][place].append(unit)

    def _words(self) -> list[Json]:
        """Scripts of words, each with the units whose windows have it as differences; -> the first word of each."""
        scripts: list[Json] = []
        held: Json = {}
        room = POSTINGS
        for word in progress(sorted(self.index, key=_utf16), "words"):
            held[word] = [np.diff(units, prepend=0).tolist() for units in self.index[word]]
            room -= sum(map(len, held[word]))
            if room <= 0:
                scripts.append(self._words_script(held, len(scripts)))
                held, room = {}, POSTINGS
        return [*scripts, self._words_script(held, len(scripts))] if held else scripts

    def _words_script(self, held: Json, number: int) -> Json:
        return {"first": next(iter(held)), "name": self.scripts.put(held, "search", f"{number:02d}")}

    def _twins(self) -> Iterator[Json]:
        """What is known of the twins of every two sites."""
        for one, other, found in self.alike.twins():
            pairs = [[pair[name] for pair in found["pairs"]] for name in TWIN]
            value = {"a": found["a"], "b": found["b"], "n_tokens": found["n_tokens"], "pairs": pairs}
            yield {"a": one, "b": other, "name": self.scripts.put(value, "twins", *one, *other)}


TWIN = ("layer", "index", "other_layer", "other_index", "correlation", "back")


def _utf16(word: str) -> bytes:
    """What JavaScript orders strings by."""
    return word.encode("utf-16-be", "surrogatepass")
