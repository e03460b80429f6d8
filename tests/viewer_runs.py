"""Small but complete runs for the viewer's tests, made by the real stages in a few seconds, and a server on them."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from transformers import GPT2Config, GPT2LMHeadModel

from cratescope.arm import Arm
from cratescope.explain.config import ExplainConfig, SimulateConfig
from cratescope.explain.explain import explain
from cratescope.explain.simulate import simulate
from cratescope.files import write_json
from cratescope.models import CrateConfig, CrateForCausalLM
from cratescope.neurons.affect import effects
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig, EffectsConfig
from cratescope.run import Run
from cratescope.sae.config import SaeConfig
from cratescope.sae.train import train_coders
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score
from cratescope.text.shards import TokenData
from cratescope.viewer.api import Api
from cratescope.viewer.data import Library
from cratescope.viewer.guard import Rules
from cratescope.viewer.server import application, listen, warm
from fake_run import Fake, fake_run, fake_tokenizer

LAYERS, WIDTH, NEURONS, CONTEXT = 2, 16, 16, 64
STEPS = (50, 100)
TRAINED = 2_000_000
MARKUP = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
HOSTILE = 'a "quoted" <i>run'
"""The name of a run."""


def viewer_runs(folder: Path, data: Path) -> list[Path]:
    """A tiny CRATE with a milestone, a dictionary and effects, its GPT-2 twin, and the untrained copy of the CRATE."""
    tokenizer = TokenData.open(data).tokenizer
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS}
    shape |= {"n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    crate = CrateForCausalLM(CrateConfig(**shape, ista_expansion=NEURONS // WIDTH))
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, n_inner=NEURONS))
    runs = []
    for name, model in (("crate", crate), ("gpt2", gpt2)):
        model.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
        collect(_collecting(folder / "runs" / name, data, model=str(folder / "models" / name)))
        runs.append(_told(folder / "runs" / name, TRAINED))
    small = {"expansion": 1, "k": 4, "tokens": 2000, "batch": 128, "buffer": 1024}
    train_coders(SaeConfig(runs[0], name="small", **small, device="cpu"))
    collect(_collecting(runs[0], data, site="sae/small"))
    effects(EffectsConfig(runs[0], contexts=8, context=8, device="cpu"))
    for run in runs:
        _explain(run)
    for step in STEPS:
        shutil.copytree(runs[0], milestone := runs[0] / "milestones" / f"step-{step:06d}", ignore=_life_only)
        _told(milestone, TRAINED * step // STEPS[-1], step)
    shutil.copytree(runs[0], untrained := folder / "runs" / "crate-untrained", ignore=_life_only)
    return [*runs, _told(untrained, 0)]


def _collecting(run: Path, data: Path, **changes: Any) -> CollectConfig:
    return CollectConfig(run, data=data, excerpts=100, context=CONTEXT, window=16, device="cpu", **changes)


def _explain(run: Path) -> None:
    explain(ExplainConfig(run, explainer="terms", protocols=("uniform",)))
    simulate(SimulateConfig(run, explainer="terms", simulator="terms", protocols=("uniform",)))
    score(ScoreConfig(run, explainer="terms", simulator="terms", protocols=("uniform",)))


def _life_only(folder: str, names: Sequence[str]) -> set[str]:
    return {"milestones", "saes", "sae-small"} & {*names}


def _told(root: Path, tokens: int, step: int = STEPS[-1]) -> Path:
    """Say in run.json that the run was trained here, and how well."""
    run = Run(root)
    manifest = json.loads(run.manifest.read_text())
    family = manifest["arm"]["family"]
    manifest["arm"] = Arm.trained(f"{family}-2l", 3, tokens, {}).row()
    manifest |= {"name": root.name, "steps": step, "parameters_without_positions": manifest["parameters"]}
    run.manifest.write_text(json.dumps({key: value for key, value in manifest.items() if key != "adopted"}))
    evaluation = {"split": "validation", "crops": 64, "n_tokens": 16384, "loss": 5.25, "standard_error": 0.013}
    write_json(run.evaluation, evaluation | {"perplexity": 190.0, "bits_per_byte": 1.7, "unigram_entropy": 6.6})
    return root


def hostile_run(folder: Path) -> Path:
    """A run without a model whose name, tokens and explanations are all markup."""
    run = fake_run(folder / HOSTILE, Fake(explanation=MARKUP))
    fake_tokenizer().save_pretrained(run.model)
    words = run.model / "tokenizer.json"
    words.write_text(words.read_text().replace('"Ġsea"', json.dumps(MARKUP)).replace('"Ġcourt"', '"<b>court</b>"'))
    return run.root


@contextlib.contextmanager
def serving(runs: Sequence[Path]) -> Iterator[str]:
    """The address of a viewer of these runs, as `cratescope view` serves it."""
    listening = listen("127.0.0.1", 0)
    port, opened = listening.getsockname()[1], threading.Event()
    api = Api(Library(runs), "cpu")
    settings: Any = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(application(api, Rules.of("127.0.0.1", port, None), opened), **settings))
    threads = [
        threading.Thread(target=warm, args=(api, opened)),
        threading.Thread(target=server.run, args=([listening],)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        opened.set()
        for thread in threads:
            thread.join()
        listening.close()
