"""Tiny random models of every causal LM class of transformers: collected, evaluated, read as an LLM, or refused.

`WRITE_MODELS=1 pytest -n 0 -m slow tests/test_any_model.py` writes docs/models.md anew.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from cratescope.config import CollectConfig, EvaluateConfig, LLMConfig
from cratescope.lm.data import TokenData
from cratescope.lm.evaluate import evaluate
from cratescope.neurons.collect import collect
from cratescope.neurons.llm.local import LocalLLM
from cratescope.neurons.records import layer_file, read_records
from cratescope.run import Run, UserError, read_json
from tiny_models import SKIPPED, tiny_model

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
CONTEXT = 32
COLLECTED = {"excerpts": 6, "context": CONTEXT, "window": 8, "top": 3, "random": 3, "batch_size": 4, "strata": False}
SITES = ("mlp", "attention", "residual")
QUICK = ("llama", "gemma3", "opt", "bloom", "mamba", "qwen3_moe")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about its own models


@dataclass
class Tried:
    """`works`: the module paths of sites, and `evaluate` and `llm`. `refused`, `failed`: what was said instead."""

    works: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name):
        try:
            yield
        except UserError as error:
            kind = self.refused if "\n" not in str(error) else self.failed
            kind[name] = str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.failed[name] = f"{said} ({Path(place.filename).name}:{place.lineno})"


def seen_by_hooks(model, pattern, layer, tokens):
    """The same activations (b, t, h), by a hook of this test's own in a plain pass."""
    found = []
    path = pattern.removesuffix(":input").replace("{layer}", str(layer))
    module = dict(model.named_modules(remove_duplicate=False))[path]

    def keep(_module, given, named, output=None):
        values = [*given, *named.values()] if pattern.endswith(":input") else output
        first = values if isinstance(values, torch.Tensor) else next(x for x in values if isinstance(x, torch.Tensor))
        found.append(first.reshape(*tokens.shape, -1))

    register = module.register_forward_pre_hook if pattern.endswith(":input") else module.register_forward_hook
    handle = register(keep, with_kwargs=True)
    model(tokens, use_cache=False)
    handle.remove()
    (activations,) = found
    return activations


def check_records(folder, model, tokens):
    """Every kept window of a few neurons of every layer is what the model does there."""
    pattern = read_json(folder / "manifest.json")["identity"]["site"]
    layers = [int(path.stem.split("-")[1]) for path in sorted(folder.glob("layer-*.parquet"))]
    assert layers
    for layer in layers:
        activations = seen_by_hooks(model, pattern, layer, tokens)
        chosen = [0, activations.shape[-1] // 2, activations.shape[-1] - 1]
        scale = float(activations.abs().max())
        for neuron, record in read_records(layer_file(folder, layer), sorted(set(chosen))).items():
            assert record.top + record.random
            for one in record.top + record.random:
                window = activations[one.excerpt, one.start : one.start + len(one.tokens), neuron]
                assert np.allclose(window.numpy(), one.activations, rtol=1e-3, atol=1e-4 * scale + 1e-9)
    return pattern


def check_loss(run, model, data):
    options = {"context": CONTEXT} if "context" in EvaluateConfig.__dataclass_fields__ else {}
    found = evaluate(EvaluateConfig(run.root, crops=4, device="cpu", **options))
    tokens = torch.from_numpy(data.split("validation").spaced(4, CONTEXT if options else 64).astype(np.int64))
    logits = model(tokens[:, :-1], use_cache=False).logits
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item(), 1e-3)


def check_llm(folder, model):
    prefix, prompts = [40, 41, 42, 43], [[50, 51, 52], [60, 61, 62, 63, 64], [70]]
    rows = [torch.tensor([prefix + prompt]) for prompt in prompts]
    plain = [model(row, use_cache=False).logits[0, -1].log_softmax(-1).numpy() for row in rows]
    engine = LocalLLM.open(LLMConfig(llm=str(folder), llm_device="cpu", llm_dtype="float32"))
    found = engine.next_logprobs(prefix, prompts)
    assert np.allclose(found, np.stack(plain), atol=2e-3)


@torch.no_grad()
def try_model(kind, data, folder):
    """Collect, evaluate and read one `model_type`; the folder is emptied afterwards."""
    tried, run = Tried(), Run(folder / "run")
    excerpts = torch.from_numpy(data.split("heldout").spaced(COLLECTED["excerpts"], CONTEXT).astype(np.int64))
    with tried.part("model"):
        model = tiny_model(kind)
        model.save_pretrained(folder / "model")
        data.tokenizer.save_pretrained(folder / "model")
    if tried.failed:
        return tried
    settings = {"model": str(folder / "model"), "data": data.path, "device": "cpu", **COLLECTED}
    for site in SITES:
        with tried.part(site):
            records = collect(CollectConfig(run.root, site=site, **settings))
            tried.works[site] = check_records(records, model, excerpts)
    if run.manifest.exists():
        with tried.part("evaluate"):
            check_loss(run, model, data)
            tried.works["evaluate"] = "yes"
    with tried.part("llm"):
        check_llm(folder / "model", model)
        tried.works["llm"] = "yes"
    shutil.rmtree(folder)
    for said in (tried.refused, tried.failed):
        said.update({name: text.replace(str(folder), "FOLDER") for name, text in said.items()})
    return tried


@pytest.mark.parametrize("kind", QUICK)
def test_a_model_trained_elsewhere_gives_what_a_plain_pass_gives(data_folder, tmp_path, kind):
    tried = try_model(kind, TokenData.open(data_folder), tmp_path / kind)
    assert not tried.failed and "residual" in tried.works


def line(kind, tried):
    sites = [f"`{tried.works[site]}`" if site in tried.works else "no" for site in SITES]
    rest = [tried.works.get(name, "no") for name in ("evaluate", "llm")]
    notes = dict.fromkeys(said.partition("; ")[0] for said in {**tried.refused, **tried.failed}.values())
    return f"| {CLASSES[kind]} ({kind}) | {' | '.join(sites + rest)} | {'; '.join(notes).replace('|', '/')} |"


def document(results):
    """docs/models.md."""
    counts = Counter("works" if tried.works.keys() & set(SITES) else "refused" for tried in results.values())
    every = Counter(name for tried in results.values() for name in tried.works)
    numbers = ", ".join(f"{name} {every[name]}" for name in (*SITES, "evaluate", "llm"))
    head = f"""# Models

Every causal language model class of transformers {transformers.__version__} ({len(CLASSES)} model types), as a tiny
random model. `collect --model` at three sites and `evaluate` are compared with hooks and losses of a plain forward
pass, and `llm` (`explain --llm FOLDER`) with the next-token probabilities of one. "no" is a refusal in one line, which
the last column begins. `tests/test_any_model.py` makes this page.

{counts["works"]} work, {counts["refused"]} are refused, {len(SKIPPED)} were not tried. By column: {numbers}.

| class | mlp | attention | residual | evaluate | llm | what is said |
|---|---|---|---|---|---|---|
"""
    rows = [line(kind, results[kind]) for kind in results]
    skipped = [f"- {CLASSES[kind]} ({kind}): {why}" for kind, why in SKIPPED.items()]
    return head + "\n".join([*rows, "", "Not tried:", "", *skipped]) + "\n"


@pytest.mark.slow
def test_every_causal_language_model_of_transformers_works_or_is_refused_in_one_line(data_folder, tmp_path):
    data = TokenData.open(data_folder)
    results = {}
    for kind in CLASSES:
        if kind not in SKIPPED:
            results[kind] = try_model(kind, data, tmp_path / kind)
            gc.collect()
    if os.environ.get("WRITE_MODELS"):
        DOCUMENT.write_text(document(results), encoding="utf-8")
    assert {kind: tried.failed for kind, tried in results.items() if tried.failed} == {}
    assert DOCUMENT.read_text(encoding="utf-8") == document(results), "write it anew with WRITE_MODELS=1"
