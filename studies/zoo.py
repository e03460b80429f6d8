"""Put finished runs into the zoo that comes with the package (src/cratescope/zoo/README.md).

    cratescope study studies/terms.toml --out terms
    python studies/zoo.py terms/runs/crate-2l-seed3 terms/runs/gpt2-2l-seed3

The final model is written in bfloat16 and evaluated, as written, on the run's own data. Its row of README.md is shown.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from cratescope.errors import UserError
from cratescope.files import atomic_folder, mark_whole, read_json, read_jsonl, write_json, write_text
from cratescope.lm.config import EvaluateConfig
from cratescope.lm.evaluate import evaluate
from cratescope.run import IDENTITY, METRICS, Run
from cratescope.text.shards import TokenData
from cratescope.zoo import ZOO

CROPS = 2000
"""Stretches of text that the losses in the listing are measured on."""
TEXT = "../data"
"""Where a model of the zoo looks for text unless told otherwise: all of them share `zoo/data`."""


def add(run: Run, zoo: Path = ZOO, crops: int = CROPS) -> Path:
    """Write the run's final model and what was measured while it was trained to `zoo`; return its folder there."""
    if not run.metrics.exists():
        raise UserError(f"{run.root}: has not been trained; the zoo takes trained models")
    entry = zoo / run.name
    with atomic_folder(entry) as folder:
        _write_model(run, folder / "model")
        write_json(folder / "run.json", _manifest(run))
        # Training into the folder of a model of the zoo is then refused like into that of any other model.
        write_json(folder / "manifest.json", {"identity": read_json(run.root / "manifest.json", IDENTITY)["identity"]})
        shutil.copyfile(run.metrics, folder / "metrics.jsonl")
        evaluate(EvaluateConfig(folder, data=run.data_path(), crops=crops, device="cpu"))
        evaluation = folder / "evaluation.json"
        write_json(evaluation, _without_platform(read_json(evaluation)))
    return entry


def _write_model(run: Run, folder: Path) -> None:
    """Save the weights in bfloat16, to be read as float32: the format is for size, and slow on many processors."""
    run.load_model().to(torch.bfloat16).save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    for code in folder.glob("*.py"):  # the package has the same
        code.unlink()
    config = read_json(folder / "config.json") | {"dtype": "float32"}
    config.pop("auto_map", None)  # names that code
    write_json(folder / "config.json", config)
    tokenizer = folder / "tokenizer.json"
    write_text(tokenizer, json.dumps(read_json(tokenizer), ensure_ascii=False, separators=(",", ":")))  # half as large
    mark_whole(folder)


def _manifest(run: Run) -> dict[str, Any]:
    """The entry run.json without the paths of the machine that it was trained on."""
    manifest = _without_platform(run.read_manifest())
    settings = {name: value for name, value in manifest["settings"].items() if name not in ("out", "data")}
    text = {"path": TEXT, "manifest_sha256": manifest["data"]["manifest_sha256"]}
    text["split_by"] = TokenData.open(run.data_path()).split_by
    return manifest | {"settings": settings, "data": text}


def row(entry: Path) -> str:
    """The model's row in the zoo's README.md."""
    tokens = read_json(entry / "run.json")["arm"]["tokens_trained"]
    training = [row["loss"] for row in read_jsonl(entry / "metrics.jsonl", METRICS) if "loss" in row]
    measured = read_json(entry / "evaluation.json")
    loss = f"{measured['loss']:.3f} ± {measured['standard_error']:.3f}"
    return f"| `zoo/{entry.name}` | {tokens / 1e6:.2f}M | {training[-1]:.3f} | {loss} |"


def _without_platform(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_platform(one) for name, one in value.items() if name != "platform"}
    return value


if __name__ == "__main__":
    for root in sys.argv[1:]:
        sys.stdout.write(f"{row(add(Run(root)))}\n")
