"""Size and speed of an exported page: MB of each layer, and what a reader waits for in Chromium, from disk.

    cratescope study studies/demo.toml --out demo
    python benchmarks/export.py demo/runs/crate-2l demo/runs/gpt2-2l --out /tmp/site

Runs of cratescope, one after another on a quiet machine; medians of `REPEATS`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from cratescope.viewer.config import ViewConfig
from cratescope.viewer.export import export

REPEATS = 7
TOKENS = 64
TEXT = "The judge said that the court had to return the licence. " * 8
TIMED = """async ([repeats, first]) => {
    const job = JOB, took = [];
    for (let n = 0; n < repeats; n++) {
        const start = performance.now();
        await job(first + n);
        took.push(performance.now() - start);
    }
    return took;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    start = time.perf_counter()
    index = export(ViewConfig(tuple(asked.runs), export=asked.out))
    print(f"exported in {time.perf_counter() - start:.0f} s")
    text = (asked.out / "data" / "manifest.js").read_text().partition(" = ")[2].rstrip(";\n")
    manifest = json.loads(text)
    for line in sizes(asked.out, manifest):
        print(line)
    for line in speeds(index, manifest):
        print(line)


def sizes(folder: Path, manifest: Any) -> list[str]:
    """MB per layer, with its share of the words; and of each model."""

    def mb(*names: str) -> float:
        return sum((folder / "data" / f"{name}.js").stat().st_size for name in names) / 1e6

    every = [(run, site, layer) for run in manifest["runs"] for site in run["sites"] for layer in site["layers"]]
    own = [mb(layer["units"], *(shard["name"] for shard in layer["shards"])) for _, _, layer in every]
    words = mb(*(one["name"] for one in manifest["search"]))
    found = [
        f"{run['name']} {site['name']} layer {layer['layer']}: {size + words * size / sum(own):.2f} MB"
        for (run, site, layer), size in zip(every, own, strict=True)
    ]
    models = [run for run in manifest["runs"] if isinstance(run["model"], dict)]
    return [*found, *(f"{run['name']} model: {mb(*run['model']['parts']):.2f} MB" for run in models)]


def speeds(index: Path, manifest: Any) -> list[str]:
    from playwright.sync_api import sync_playwright

    run = manifest["runs"][0]
    able = [one["name"] for one in manifest["runs"] if isinstance(one["model"], dict)]
    unit = json.dumps([run["name"], run["sites"][0]["name"], run["sites"][0]["layers"][-1]["layer"]])
    live = {"runs": able, "order": {"by": "activation", "tokens": []}, "limit": 50}
    steer = {"run": able[0], "edits": ["1:3=1"], "prompt": "1 2 3 4 5", "tokens": TOKENS} if able else {}
    jobs = {
        "card of another neuron": f"(n) => Cratescope.source.card(...{unit}, n * 64)",
        "search": "(n) => Cratescope.source.search(['judge', 'river', 'court', 'salt'][n % 4])",
    }
    if able:
        jobs["64 tokens through all models"] = (
            f"(n) => Cratescope.source.live({{ ...{json.dumps(live)}, text: {json.dumps(TEXT)}.slice(0, 220) + n }})"
        )
        jobs[f"{TOKENS} tokens plain and steered"] = f"() => Cratescope.source.steer({json.dumps(steer)}, () => {{}})"
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(f"{index.resolve().as_uri()}#/n/{'/'.join(map(str, json.loads(unit)))}/3")
        page.wait_for_selector("main h1")
        found = [f"first card: {1000 * (time.perf_counter() - start):.0f} ms after the page is opened"]
        for name, code in jobs.items():
            page.evaluate(TIMED.replace("JOB", code), [1, 0])
            took = page.evaluate(TIMED.replace("JOB", code), [REPEATS, 1])
            found.append(f"{name}: {statistics.median(took):.0f} ms")
        browser.close()
    return found


if __name__ == "__main__":
    main()
