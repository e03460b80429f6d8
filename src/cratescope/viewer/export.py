"""An export: the viewer's pages in a folder, with their data in scripts, to be opened from disk or any web server.

data/manifest.js says what there is; every other script of data hands a gzip of JSON, or of float16 numbers, to the
page (page/shards.js).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cratescope.errors import UserError
from cratescope.files import atomic_folder, slug, write_text
from cratescope.neurons.records import NeuronRecord, read_records
from cratescope.neurons.steer import quantile
from cratescope.progress import progress
from cratescope.viewer.config import ViewConfig
from cratescope.viewer.data import Library
from cratescope.viewer.opened import Opened, OpenedSite
from cratescope.viewer.packed import Json, Packer, Words, compact, few, narrow, script, words_of
from cratescope.viewer.values import finite

PAGE = Path(__file__).with_name("page")
INSIDE = ("tokenizer.js", "model.js", "steering.js", "shards.js", "inside.js", "exported.js")
"""Scripts that only an export needs; they stand after data.js."""
SHARD = 64
"""Units in one script."""
AT_ONCE = 512
"""Units read at a time."""
PART = 1 << 19
"""Numbers of a model in one script: a page that reads them stays responsive."""
POSTINGS = 1 << 17
"""Units named in one script of words."""
MANIFEST = Path("data") / "manifest.js"


def export(config: ViewConfig) -> Path:
    """Write the pages of some runs and return the page's path.

    Raises:
        UserError: a folder that holds something else, or a run that cannot be read.
    """
    assert config.export is not None
    folder = config.export
    check_free(folder)
    library = Library(config.runs)
    with atomic_folder(folder) as new:
        write_page(new)
        Export(library, new, config.model).write()
    return folder / "index.html"


def check_free(folder: Path) -> None:
    """UserError: there is something that is no earlier export."""
    there = folder.is_dir() and any(folder.iterdir())
    if (folder.exists() and not folder.is_dir()) or (there and not (folder / MANIFEST).is_file()):
        raise UserError(f"--export {folder}: there is something else than an earlier export; name a new folder")


def write_page(folder: Path) -> None:
    """The same page as the server's, with the scripts of an export."""
    shutil.copytree(PAGE, folder / "page", ignore=shutil.ignore_patterns("index.html", ".*"))
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    found = re.search(r"([ \t]*)<script src=\"page/data\.js\"[^>]*></script>\n", text)
    assert found, "index.html has no data.js"
    names = [*(f"page/{name}" for name in INSIDE), MANIFEST.as_posix()]
    scripts = "".join(f'{found[1]}<script src="{name}"></script>\n' for name in names)
    write_text(folder / "index.html", text[: found.end()] + scripts + text[found.end() :])


@dataclass
class Export:
    """Writes the data of an export. `names` are those of its scripts so far, in small letters."""

    library: Library
    folder: Path
    model: bool
    names: set[str] = field(default_factory=set)
    tokenizers: dict[str, str] = field(default_factory=dict)
    index: dict[str, tuple[list[int], list[int]]] = field(default_factory=lambda: defaultdict(lambda: ([], [])))
    indexed: int = 0
    units: int = 0

    def write(self) -> None:
        (self.folder / "data").mkdir()
        runs = [self._run(opened) for opened in self.library.opened.values()]
        home = self.library.home() | {"notes": {}}
        for run, entry in zip(runs, home["runs"], strict=True):
            entry["model"]["can_run"] = True if isinstance(run["model"], dict) else run["model"]
        about = {"version": home["version"], "home": self.put(home, "home"), "runs": runs, "search": self._words()}
        text = f"window.CRATESCOPE_EXPORT = {compact(about)};\n"
        write_text(self.folder / MANIFEST, text)

    def put(self, value: Any, *parts: object) -> str:
        """Write a script and return its name, which is made of `parts` and like no other one's."""
        whole = "-".join(slug(str(part)) for part in parts)
        name, again = whole, 2
        while name.lower() in self.names:
            name, again = f"{whole}-again-{again}", again + 1
        self.names.add(name.lower())
        write_text(self.folder / "data" / f"{name}.js", script(name, value))
        return name

    def _run(self, opened: Opened) -> Json:
        words = Words()
        sites = [self._site(opened, site, words) for site in opened.sites.values()]
        return {
            "name": opened.name,
            "sites": sites,
            "words": self.put([*words.numbers], "words", opened.name),
            "model": self._model(opened),
        }

    def _site(self, opened: Opened, site: OpenedSite, words: Words) -> Json:
        table = self.library.table(opened.name, site.name)
        first, self.units = self.units, self.units + len(table["index"])
        layers = [self._layer(opened, site, layer, words) for layer in site.layers]
        return {
            "name": site.name,
            "first": first,
            "table": self.put(table, "table", opened.name, site.name),
            "layers": layers,
        }

    def _layer(self, opened: Opened, site: OpenedSite, layer: int, words: Words) -> Json:
        indices = site.units(layer).index.tolist()
        shards = []
        label = f"{opened.name} {site.name} {layer}"
        for cards in progress(self._cards(opened, site, layer, indices), label, -(-len(indices) // SHARD)):
            packer = Packer(words)
            packed = {card["index"]: packer.pack(card) for card in cards}
            value = {"edges": [*packer.edges], "cards": packed}
            name = self.put(value, "cards", opened.name, site.name, layer, f"{len(shards):02d}")
            shards.append({"name": name, "first": cards[0]["index"]})
        units = self.put(sizes(site, layer, indices), "units", opened.name, site.name, layer)
        return {"layer": layer, "units": units, "shards": shards}

    def _cards(self, opened: Opened, site: OpenedSite, layer: int, indices: Sequence[int]) -> Iterator[list[Json]]:
        """Cards of a layer, as many at a time as go into one script; their words are added to the index."""
        for start in range(0, len(indices), AT_ONCE):
            cards = self.library.cards(opened.name, site.name, layer, indices[start : start + AT_ONCE], few)
            for place in range(0, len(cards), SHARD):
                thin = [*map(narrow, cards[place : place + SHARD])]
                for card in thin:
                    self._add_words(card)
                yield thin

    def _add_words(self, card: Json) -> None:
        for place, words in enumerate(words_of(card)):
            for word in words:
                self.index[word][place].append(self.indexed)
        self.indexed += 1

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
        return {"first": next(iter(held)), "name": self.put(held, "search", f"{number:02d}")}

    def _model(self, opened: Opened) -> Json | str:
        """The model for the page, or why the page has none."""
        from cratescope.viewer import inside

        if not self.model:
            return "This page was exported without its models. Open it with `cratescope view`."
        if opened.can_run is not True:
            return f"{opened.can_run}"
        return inside.refusal(opened.run) or ModelExport(self, opened).write()


def _utf16(word: str) -> bytes:
    """What JavaScript orders strings by."""
    return word.encode("utf-16-be", "surrogatepass")


class ModelExport:
    """Writes one run's model, its tokenizer, and the sparse autoencoders that its sites need."""

    def __init__(self, to: Export, opened: Opened) -> None:
        from cratescope.viewer import inside
        from cratescope.viewer.loaded import Loaded

        self.to, self.opened, self.inside = to, opened, inside
        self.loaded = Loaded(opened)
        self.whole = inside.inside(opened.name, self.loaded.model)
        self.room = inside.LARGEST - self.whole.size

    def write(self) -> Json:
        family = self.whole.about["family"]
        named = self.inside.places(family)
        sites: dict[str, Json] = {name: {"place": place, "coders": None} for name, place in named.items()}
        problems = [*self.loaded.problems]
        places = []
        for one in self.loaded.places:
            where = self.inside.place_of(family, one.site.pattern)
            coder = self._coder(one) if where else None
            if where is None or isinstance(coder, str):
                problems.append(coder or f"{one.name} is not read inside this page; open it with `cratescope view`")
                continue
            if coder:
                sites.setdefault(one.name, {"place": where, "coders": {}})["coders"][str(one.layer)] = len(places)
            places.append(self._place(one, where, coder))
        about = {"tokenizer": self._tokenizer(), "native": next(iter(named)), "sites": sites, "places": places}
        return self._numbers(self.whole, "model", self.opened.name) | about | {"problems": [*dict.fromkeys(problems)]}

    def _place(self, one: Any, where: str, coder: Json | None) -> Json:
        about = self.whole.about
        wide = about["neurons"] if where in ("neurons", "first_codes") else about["width"]
        return {
            "site": one.name,
            "layer": one.layer,
            "place": where,
            "coder": coder,
            "width": coder["about"]["width"] if coder else wide,
            "recorded": one.units is not None,
        }

    def _coder(self, one: Any) -> Json | str | None:
        """The place's autoencoder, if it is of one; or why the page has it not."""
        coder = getattr(one.site, "coders", {}).get(one.layer)
        if coder is None:
            return None
        found = self.inside.coder_inside(self.opened.name, coder)
        if found.size > self.room:
            return f"{one.name} of layer {one.layer} is too large for this page; open it with `cratescope view`"
        self.room -= found.size
        return self._numbers(found, "coder", self.opened.name, one.name, one.layer)

    def _numbers(self, of: Any, *name: object) -> Json:
        """Write the numbers of a model or an autoencoder."""
        flat = np.concatenate([tensor.ravel() for tensor in of.tensors.values()])
        parts = [flat[start : start + PART].tobytes() for start in range(0, len(flat), PART)]
        names = [
            self.to.put(part, *name, f"{number:02d}")
            for number, part in enumerate(progress(parts, " ".join(map(str, name))))
        ]
        tensors = [[key, tensor.size] for key, tensor in of.tensors.items()]
        return {"about": of.about, "tensors": tensors, "parts": names, "size": len(flat)}

    def _tokenizer(self) -> str:
        """The name of its script; models of one tokenizer share it."""
        value = self.inside.tokenizer_inside(self.opened.run.tokenizer.backend_tokenizer)
        digest = hashlib.sha256(compact(value).encode()).hexdigest()
        if digest not in self.to.tokenizers:
            self.to.tokenizers[digest] = self.to.put(value, "tokenizer", self.opened.name)
        return self.to.tokenizers[digest]


def sizes(site: OpenedSite, layer: int, indices: Sequence[int]) -> Json:
    """Of every unit of a layer what live text and edits need, in full precision: numbers and histogram."""
    names = ("density", "mean", "maximum")
    found: Json = {name: [] for name in ("index", *names, "quantile", "bins", "count")}
    edges: dict[tuple[float, float], int] = {}
    for start in range(0, len(indices), AT_ONCE):
        for index, record in read_records(site.file(layer), indices[start : start + AT_ONCE], strata=()).items():
            bins = [] if record.histogram is None else _numbered(record, edges)
            found["index"].append(index)
            found["density"].append(finite(record.density))
            found["mean"].append(finite(record.moments.mean))
            found["maximum"].append(finite(record.moments.maximum))
            found["quantile"].append(finite(quantile(record)) if bins else None)
            found["bins"].append(np.diff(bins, prepend=0).tolist())
            found["count"].append(record.histogram.count.tolist() if record.histogram is not None else [])
    return found | {"edges": [*edges]}


def _numbered(record: NeuronRecord, edges: dict[tuple[float, float], int]) -> list[int]:
    """The bins of a histogram by number; new ones are added to `edges`."""
    assert record.histogram is not None
    pairs = zip(record.histogram.low.tolist(), record.histogram.high.tolist(), strict=True)
    return [edges.setdefault(pair, len(edges)) for pair in pairs]
