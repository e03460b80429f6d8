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

from cratescope.errors import UserError
from cratescope.files import read_json, write_json
from cratescope.llm.config import LLMConfig
from cratescope.llm.local import LocalLLM
from cratescope.lm.config import EvaluateConfig
from cratescope.lm.evaluate import evaluate
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.records import layer_file, read_records
from cratescope.neurons.sites import BUILT_IN, sites_of
from cratescope.run import Run
from cratescope.text.shards import TokenData
from tiny_models import NOT_MADE, tiny_model

ROOT = Path(__file__).parents[1]
DOCUMENT, CONSTRAINTS = ROOT / "docs" / "models.md", ROOT / "constraints.txt"
CONTEXT = 32
COLLECTED = {"excerpts": 6, "context": CONTEXT, "window": 8, "top": 3, "random": 3, "batch_size": 4, "strata": False}
SITES = ("mlp", "attention", "residual")
MORE = ("experts", "mixer")
"""Sites that few models have."""
QUICK = ("llama", "gemma3", "opt", "bloom", "mamba", "qwen2_moe")

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
    path = pattern.partition(":")[0].replace("{layer}", str(layer))
    module = dict(model.named_modules(remove_duplicate=False))[path]
    if pattern.endswith(":neurons"):
        return seen_in_experts(model, module, tokens)

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


def seen_in_experts(model, experts, tokens):
    """The same of a mixture of experts, from a pass that has the tokens in order: each as often as it has experts."""
    found, chosen = [], []
    name = "_apply_gate" if experts.has_gate else "act_fn"
    activate = getattr(experts, name)
    handle = experts.register_forward_pre_hook(lambda _module, given: chosen.append(given[1].flatten()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts.config, "_experts_implementation_internal", "batched_mm")
        patch.setitem(experts.__dict__, name, lambda wide: found.append(activate(wide)) or found[-1])
        model(tokens, use_cache=False)
    handle.remove()
    (rows,), (chosen,) = found, chosen
    activations = rows.new_zeros(tokens.numel(), len(experts.down_proj), rows.shape[-1])
    activations[torch.arange(tokens.numel()).repeat_interleave(len(chosen) // tokens.numel()), chosen] = rows
    return activations.view(*tokens.shape, -1)


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
    found = evaluate(EvaluateConfig(run.root, crops=4, context=CONTEXT, device="cpu"))
    tokens = torch.from_numpy(data.split("validation").spaced(4, CONTEXT).astype(np.int64))
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
    """Collect, evaluate and read one `model_type`; the folder is removed afterwards."""
    tried, run = Tried(), Run(folder / "run")
    data.tokenizer.save_pretrained(folder / "model")
    settings = {"model": str(folder / "model"), "data": data.path, "device": "cpu", **COLLECTED}
    if kind in NOT_MADE:
        write_json(folder / "model" / "config.json", {"model_type": kind})
        with tried.part("collect"):
            tried.works["collect"] = str(collect(CollectConfig(run.root, **settings)))
    else:
        try_parts(tried, kind, data, folder, settings)
    shutil.rmtree(folder)
    for said in (tried.refused, tried.failed):
        said.update({name: text.replace(str(folder), "FOLDER") for name, text in said.items()})
    return tried


def try_parts(tried, kind, data, folder, settings):
    model, run = tiny_model(kind), Run(folder / "run")
    model.save_pretrained(folder / "model")
    excerpts = torch.from_numpy(data.split("heldout").spaced(COLLECTED["excerpts"], CONTEXT).astype(np.int64))
    known = BUILT_IN.get(model.config.model_type) or sites_of(model)
    for site in (*SITES, *(name for name in MORE if name in known)):
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


@pytest.mark.parametrize("kind", QUICK)
def test_a_model_trained_elsewhere_gives_what_a_plain_pass_gives(data_folder, tmp_path, kind):
    tried = try_model(kind, TokenData.open(data_folder), tmp_path / kind)
    assert not tried.failed and "residual" in tried.works


def line(kind, tried):
    sites = [f"`{tried.works[site]}`" if site in tried.works else "no" for site in SITES]
    rest = [tried.works.get(name, "no") for name in ("evaluate", "llm")]
    more = ", ".join(f"{site} `{tried.works[site]}`" for site in MORE if site in tried.works)
    notes = dict.fromkeys(said.partition("; ")[0] for said in {**tried.refused, **tried.failed}.values())
    return f"| {CLASSES[kind]} ({kind}) | {' | '.join([*sites, more, *rest])} | {'; '.join(notes).replace('|', '/')} |"


def document(results):
    """docs/models.md."""
    every = Counter(name for tried in results.values() for name in tried.works)
    works = sum(bool(tried.works.keys() & set(SITES)) for tried in results.values())
    skipped = len(CLASSES) - len(results)
    numbers = ", ".join(f"`{name}` {every[name]}" for name in (*SITES, *MORE))
    head = f"""# Models

`collect --model`, `evaluate` and `explain --llm` take any causal language model that transformers has a class for.
These are all classes of transformers {transformers.__version__}, {len(CLASSES)} model types.
A tiny random model of each was tried:

- **{works} work** at one site or more, **{len(results) - works} are refused** in one line, **{skipped} were skipped**,
  and none ends in a traceback. Of those refused, {len(NOT_MADE)} were tried without weights; they stand at the end.
- How many have which site: {numbers}.
- {every["evaluate"]} can be evaluated, and {every["llm"]} can be the LLM that explains (`explain --llm FOLDER`).

"Works" means: the activations in the records are those that hooks see in a plain forward pass, the loss is that of a
plain forward pass, and so are the next-token probabilities. The columns mlp, attention and residual say where the site
is; "no" means that it is refused, and the last column how that line begins. [records.md](records.md) says what a site
is. `tests/test_any_model.py` makes this page, and `make slow` checks it.

| class | mlp | attention | residual | more sites | evaluate | llm | what is said |
|---|---|---|---|---|---|---|---|
"""
    rows = [line(kind, results[kind]) for kind in results]
    without = [f"- {CLASSES[kind]} ({kind}): {why}" for kind, why in NOT_MADE.items()]
    return head + "\n".join([*rows, "", "Tried without weights, and refused:", "", *without]) + "\n"


@pytest.mark.slow
def test_every_causal_language_model_of_transformers_works_or_is_refused_in_one_line(data_folder, tmp_path):
    data = TokenData.open(data_folder)
    results = {}
    for kind in CLASSES:
        results[kind] = try_model(kind, data, tmp_path / kind)
        gc.collect()
    if os.environ.get("WRITE_MODELS"):
        DOCUMENT.write_text(document(results), encoding="utf-8")
    assert {kind: tried.failed for kind, tried in results.items() if tried.failed} == {}
    assert not [kind for kind in NOT_MADE if results[kind].works], "they can be made after all"
    assert DOCUMENT.read_text(encoding="utf-8") == document(results), "write it anew with WRITE_MODELS=1"


def test_the_page_of_models_is_about_the_pinned_transformers():
    pinned = next(one for one in CONSTRAINTS.read_text().splitlines() if one.startswith("transformers=="))
    head = DOCUMENT.read_text(encoding="utf-8").partition("|")[0]
    assert f"transformers {pinned.partition('==')[2]}, {len(CLASSES)} model types" in head
