"""The viewer's server as a browser meets it: opening, searching, typing, and a model of 36,864 neurons.

    make demo && python benchmarks/viewer.py demo/runs/crate-2l demo/runs/gpt2-2l
    python benchmarks/viewer.py --layers 12 --width 3072     # made-up records of size B only

Every server is a process of its own, `cratescope view` as a user starts it. *First card* is all that the page asks for,
one after the other, from / to the card; *cold* for the first browser after the start, *warm* for the second; *in
Chromium* is from the address being opened in a new page until the card stands there, where Playwright is. *Search*
goes through the explanations and the top windows of all units of the runs. *Live text* is a new text of 64 tokens
through all runs with a model, all units ranked by surprise. Made-up records have as many units as asked for, each with
windows of 64 tokens and a histogram of 100 bins; *memory* is the most that the process has held (VmHWM).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from cratescope.arm import Arm
from cratescope.files import write_json
from cratescope.neurons.records import layer_file, list_column, stratum_lists, window_array, write_table
from cratescope.run import Run

WORDS = ("the", "licence", "court", "return", "sea", "1998", "whale", "import", "of the", "zzz")
TEXT = "The captain of the ship said that the court of the old city had sold its licence in March, and that no whale "
TEXT += (
    "would cross the sea before January. def find(self, name): return None. Salt the water, add three apples and boil "
)
TEXT += "them. It was a year of law and order for all people of the king."
LIMITS = {
    "first card": 1.0,
    "search": 0.1,
    "live text of 64 tokens": 0.15,
    "size B: home": 2.0,
    "size B: memory": 1000.0,
}
"""What has to be reached: seconds, and MB."""


@dataclass(frozen=True)
class Options:
    """Measure the viewer."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run directories, such as those of the demo; without any only made-up records are measured."""
    layers: int = 12
    """Layers of the made-up records; 0 for none."""
    width: int = 3072
    """Units per layer of these."""
    windows: int = 10
    """Windows of each kind, top and random, of every unit of these."""
    rounds: int = 5
    """Servers that are started, and measurements in each."""
    json: Path | None = None
    """Also write the measurements here."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows = measure_runs(options) if options.runs else []
    if options.layers:
        rows += measure_made_up(options)
    table = Table(title=f"{os.cpu_count()} processors")
    for name in ("measured", "median", "most", "limit"):
        table.add_column(name, justify="left" if name == "measured" else "right")
    for row in rows:
        table.add_row(row["name"], *(shown(row.get(name), row["unit"]) for name in ("median", "most", "limit")))
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} MB" if unit == "MB" else f"{1000 * value:,.0f} ms"


def row(name: str, values: Sequence[float], unit: str = "s") -> dict[str, Any]:
    limit = next((LIMITS[key] for key in LIMITS if name.startswith(key)), None)
    return {"name": name, "median": statistics.median(values), "most": max(values), "limit": limit, "unit": unit}


@dataclass
class Server:
    """A viewer that runs; `started` is when."""

    address: str
    process: subprocess.Popen[str]
    started: float

    def get(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers)) as answer:
            return answer.read()

    def most_memory(self) -> float:
        """MB."""
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) / 1000 if found else float("nan")


@contextmanager
def serving(runs: Sequence[Path]) -> Iterator[Server]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "cratescope", "view", *map(str, runs), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        for line in process.stderr:
            if found := re.search(r"http://[^ ]*/", line.replace("\n", "")):
                yield Server(found[0], process, start)
                return
        raise SystemExit("the viewer did not start")
    finally:
        process.terminate()
        process.wait()


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def open_page(server: Server, run: str, place: int) -> None:
    """Ask for what the page asks for until the first card is there."""
    page = server.get("").decode() if has_page() else ""
    for path in re.findall(r'(?:src|href)="(?:\./|/)?(page/[^"]+)"', page):
        server.get(path)
    home = json.loads(server.get("api/home"))
    site = next(one for one in home["runs"] if one["name"] == run)["sites"][0]["name"]
    table = json.loads(server.get(f"api/table/{quote(run)}/{quote(site, safe='')}"))
    layer, index = table["layer"][place], table["index"][place]
    server.get(f"api/card/{quote(run)}/{quote(site, safe='')}/{layer}/{index}")


def in_chromium(server: Server, run: str) -> Iterator[tuple[str, float]]:
    """Seconds until a card is there, in a page that was never open and in another one."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None or not has_page():
        return
    site = json.loads(server.get("api/home"))["runs"][0]["sites"][0]["name"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        browser.new_page().goto("about:blank")  # its own start is not the viewer's
        for number, when in enumerate(("cold", "warm")):
            page = browser.new_page()
            start = time.perf_counter()
            page.goto(f"{server.address}#/n/{quote(run)}/{quote(site, safe='')}/0/{number + 10}")
            page.wait_for_selector("article.neuron", timeout=60_000)
            yield f"first card in Chromium, {when}", time.perf_counter() - start
        browser.close()


def has_page() -> bool:
    import cratescope.viewer

    return (Path(cratescope.viewer.__file__).parent / "page" / "index.html").exists()


def measure_runs(options: Options) -> list[dict[str, Any]]:
    """Start, first card, search and live text."""
    name = Run(options.runs[0]).name
    found: dict[str, list[float]] = {}

    def note(what: str, value: float) -> None:
        found.setdefault(what, []).append(value)

    for number in range(options.rounds):
        with serving(options.runs) as server:
            note("start, until the address is printed", time.perf_counter() - server.started)
            time.sleep(3)  # nobody clicks before
            note("first card, cold", seconds(lambda: open_page(server, name, 3)))
            note("first card, warm", seconds(lambda: open_page(server, name, 4)))
            note("next card", seconds(lambda: open_page(server, name, 5)))
            for what, value in in_chromium(server, name):
                note(what, value)
            server.get("api/search?q=warm")
            live(server, "warm")
            for word in WORDS:
                note("search", seconds(partial(server.get, f"api/search?q={quote(word)}")))
            for turn in range(options.rounds):
                note("live text of 64 tokens", live(server, f"{number}{turn} {TEXT}"))
            note("order by other tokens", live(server, f"{number}{turn} {TEXT}", [7]))
    return [row(what, values) for what, values in found.items()]


def live(server: Server, text: str, tokens: Sequence[int] = ()) -> float:
    """Seconds of one text, cut to 64 tokens, through all models."""
    cut = text
    while len(tokens_of(server, cut)) > 64:
        cut = cut[:-4]
    request = {"text": cut + ("" if tokens else "."), "order": {"by": "surprise", "tokens": [*tokens]}}
    return seconds(lambda: server.get("api/live", request))


_COUNTED: dict[str, list[str]] = {}


def tokens_of(server: Server, text: str) -> list[str]:
    """The tokens of the run that has most of them."""
    if text not in _COUNTED:
        found = json.loads(server.get("api/live", {"text": text, "limit": 1}))["runs"]
        _COUNTED[text] = max((one["tokens"] for one in found), key=len)
    return _COUNTED[text]


def measure_made_up(options: Options) -> list[dict[str, Any]]:
    """Home, table, card and memory of a run with made-up records."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = made_up(Path(folder) / "crate-b", options)
        for _ in range(min(options.rounds, 3)):
            with serving([run.root]) as server:
                for what, path in (
                    ("home", "api/home"),
                    ("table", "api/table/crate-b/codes"),
                    ("card", "api/card/crate-b/codes/0/100"),
                    ("next card", "api/card/crate-b/codes/0/101"),
                ):
                    found.setdefault(what, []).append(seconds(partial(server.get, path)))
                found.setdefault("memory", []).append(server.most_memory())
                found.setdefault("first search", []).append(seconds(lambda: server.get("api/search?q=sea")))
                found.setdefault("next search", []).append(seconds(lambda: server.get("api/search?q=ship")))
                found.setdefault("memory after searching", []).append(server.most_memory())
    label = "size B" if (options.layers, options.width) == (12, 3072) else f"{options.layers} x {options.width}"
    return [row(f"{label}: {what}", values, "MB" if "memory" in what else "s") for what, values in found.items()]


def made_up(root: Path, options: Options) -> Run:
    """A run without a model, with records of random numbers."""
    run = Run(root)
    about = {"arm": Arm.trained("crate-b", 0, 10**9, {}).row(), "parameters": 10**8, "n_layer": options.layers}
    data = {"path": "nowhere", "manifest_sha256": "0" * 64}
    write_json(run.manifest, about | {"context": 1024, "steps": 1, "data": data})
    if options.runs and (source := Run(options.runs[0]).model).exists():
        run.model.mkdir()
        for path in source.glob("tokenizer*"):
            shutil.copy(path, run.model)
    for layer in range(options.layers):
        columns = made_up_layer(layer, options.width, options.windows, np.random.default_rng(layer))
        write_table(layer_file(run.records("codes"), layer), columns)
    return run


def made_up_layer(layer: int, n: int, windows: int, random: np.random.Generator) -> dict[str, Any]:
    """Columns of one layer's records."""
    density, maximum = random.random(n) ** 4, random.lognormal(size=n)
    moments = {name: random.random(n) for name in ("mean", "variance", "third", "fourth", "skewness", "kurtosis")}
    nothing = stratum_lists(np.zeros(n, int), np.zeros(0), np.zeros(0), list_column(np.zeros(0, int), no_windows()))
    edges = np.geomspace(1e-3, 1, 101)
    bins = [{"low": low, "high": high, "count": 1000} for low, high in zip(edges[:-1], edges[1:], strict=True)]
    tokens = [{"token": 5, "mean": 1.0, "count": 10}] * 10
    return {
        **{"model": ["crate-b"] * n, "site": ["codes"] * n, "layer": [layer] * n, "index": np.arange(n)},
        **{"n_tokens": np.full(n, 8_000_000), **moments, "maximum": maximum},
        **{"density": density, "dead": density == 0},
        **{name: random_windows(n, windows, random) for name in ("top", "random")},
        **dict.fromkeys(("by_quantile", "by_rank", "by_level"), nothing),
        "histogram": [bins] * n,
        **dict.fromkeys(("top_tokens", "bottom_tokens"), [tokens] * n),
    }


def no_windows() -> Any:
    nothing = np.zeros(0, dtype=np.int64)
    return window_array(nothing, nothing, nothing, nothing, nothing, nothing)


def random_windows(n: int, windows: int, random: np.random.Generator) -> Any:
    """The same excerpts for all units, since windows of a pass are parts of the same text."""
    text = np.random.default_rng(0).integers(5, 4000, (2000, 1024))
    m = n * windows
    excerpt, start = random.integers(0, len(text), m), random.integers(0, 1024 - 64, m)
    tokens = text[excerpt[:, None], start[:, None] + np.arange(64)]
    activations = np.where(random.random((m, 64)) < 0.1, random.random((m, 64)), 0)
    found = window_array(tokens.ravel(), activations.ravel(), np.full(m, 64), excerpt, start, np.full(m, 32))
    return list_column(np.full(n, windows), found)


if __name__ == "__main__":
    main()
