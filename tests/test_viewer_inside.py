"""The model inside the page: JavaScript against PyTorch and the library's tokenizer, in Chromium."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from chromium import chromium
from cratescope.errors import UserError
from cratescope.models import CrateConfig
from cratescope.models.presets import build
from cratescope.models.sae import CoderConfig, Origin, SparseCoder
from cratescope.neurons.coded import CodedSite
from cratescope.neurons.sites import BUILT_IN, Site, read_site, site_named
from cratescope.neurons.spelled import read_edit
from cratescope.neurons.steer import steered
from cratescope.run import Run
from cratescope.text.tokenizer import encode, load_tokenizer, train_bpe, vocabulary_strings
from cratescope.viewer import export
from cratescope.viewer.inside import Inside, coder_inside, inside, places, tokenizer_inside

pytestmark = pytest.mark.browser

NASTY = (
    *("", " ", "  ", "\n", "   \n\n  x  ", " " * 300 + "x", "a" * 700, "tab\t\ttab\r\n\r\n", "\u3000\u3000x\xa0 y"),
    *("I'm we'll they've 'sss''t 'S 're", "!!'s -- ??", "abc123 4½² ١٢٣", "<|endoftext|>a<|endoftext|>", "<script>"),
    *("日本語テキスト と 中文", "🙂👩‍👩‍👧 é́ ñ", "İstanbul ẞ ǅ", "ठ ि हिन्दी ไทย", "𐐀𝟙 𝒳 \U000e0041"),
    *("\x00\x01\x7f\x85\u2028\ufeffa\u180eb\u200b c", "Ωμέγα και ѐ", "ﷺ مرحبا بالعالم", "\uffff\U0010ffff", "a\u0301"),
)
TEXTS = (
    *("The judge said that the contract", "1 2 3 4 5", "def f(x):\n    return x + 1", "Once upon a time", "Salt and"),
    *("In 1998 the", "HAMLET.\nTo be, or", "Paris is the capital of", "the the the the", "import os\nimport"),
    *("He went to the river and", "(a) any party", "Add the flour; stir", '"What?" she asked.', "http://www."),
    *("A number like 42, or 43", "ROMEO and JULIET", "The species is found in", "\n\n\n", "for i in range(10):"),
)


@pytest.fixture(scope="module")
def page():
    """An empty page with the scripts of the model."""
    with chromium() as browser:
        page = browser.new_page()
        page.evaluate("window.Cratescope = {}")
        for name in export.INSIDE:
            page.add_script_tag(path=str(export.PAGE / name))
        yield page


def put(page: Any, name: str, kind: str, found: Inside) -> None:
    """Make `window[name]` a Model or Coder of the page."""
    flat = np.concatenate([tensor.ravel() for tensor in found.tensors.values()])
    sizes = [[key, tensor.size] for key, tensor in found.tensors.items()]
    page.evaluate(
        """([name, kind, about, sizes, text]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)), tensors = {};
            const all = Cratescope.inside.fromHalf(new Uint16Array(bytes.buffer));
            let at = 0;
            for (const [key, size] of sizes) tensors[key] = all.subarray(at, (at += size));
            window[name] = new Cratescope.inside[kind](about, tensors);
        }""",
        [name, kind, found.about, sizes, base64.b64encode(flat.tobytes()).decode()],
    )


def put_tokenizer(page: Any, tokenizer: Any) -> None:
    about = tokenizer_inside(tokenizer.backend_tokenizer)
    page.evaluate("(about) => { window.tokenizer = new Cratescope.inside.Tokenizer(about); }", about)


@torch.no_grad()
def rounded(model):
    """The model with the weights that an export has."""
    for weight in model.parameters():
        weight.copy_(weight.half().float())
    return model.eval()


RUN = """([ids, place, edits, prompt, replace]) => {
    const seen = {}, cache = model.fresh();
    const sites = { own: { place: "neurons", coders: null } };
    sites.sae = { place: "neurons", coders: window.coders ?? null };
    for (const name of ["first_codes", "attention", "residual"]) sites[name] = { place: name, coders: null };
    const { readEdit } = Cratescope.inside;
    const read = (text) => ({ ...readEdit(text), site: readEdit(text).site ?? "own" });
    const steering = new Cratescope.inside.Steering(edits.map(read), sites, prompt, replace);
    const parts = Array.isArray(ids[0]) ? ids : [ids], logits = [];
    const asText = (parts) => {
        const bytes = new Uint8Array(Float32Array.from(parts.flatMap((part) => [...part])).buffer);
        return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
    };
    for (const part of parts) {
        steering.start(cache.length);
        const states = model.run(cache, part, (at, layer, x, width) => {
            steering.visit(at, layer, x, width);
            if (at === place) (seen[layer] ??= []).push(x.slice());
        });
        logits.push(model.logits(states, 0, part.length));
    }
    return [asText(logits), Object.entries(seen).map(([layer, parts]) => [layer, asText(parts)])];
}"""


def in_page(page: Any, ids: Any, place: str = "neurons", edits: Any = (), prompt: int = 0, replace: bool = False):
    """Logits (t, v) and activations (t, h) by layer, as the page computes them."""
    logits, seen = page.evaluate(RUN, [ids, place, [*edits], prompt, replace])
    n = len(ids) if isinstance(ids[0], int) else sum(map(len, ids))

    def table(text):
        return np.frombuffer(base64.b64decode(text), np.float32).astype(np.float64).reshape(n, -1)

    return table(logits), {int(layer): table(text) for layer, text in seen}


@torch.no_grad()
def in_torch(model, ids, site, edits=(), prompt=None):
    with steered(model, edits, prompt), read_site(model, site, site.layers(model)) as seen:
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    return logits, {layer: x[0].double().numpy() for layer, x in seen.items()}


def assert_alike(found, expected, within=1e-4):
    assert found[1].keys() == expected[1].keys()
    for one, other in ((found[0], expected[0]), *((found[1][layer], expected[1][layer]) for layer in expected[1])):
        assert one.shape == other.shape
        assert np.abs(one - other).max() < within * max(1.0, np.abs(other).max() / 100)


@pytest.fixture(scope="module")
def tokenizers():
    texts = (*NASTY, *TEXTS) * 3
    return {
        "gpt2": load_tokenizer("gpt2"),
        "zoo": load_tokenizer("zoo/crate-2l-seed3"),
        "own": train_bpe(iter(texts), 300),
    }


@pytest.mark.parametrize("name", ["gpt2", "zoo", "own"])
def test_tokens_and_their_texts_are_the_library_s_on_nasty_texts(page, tokenizers, name):
    tokenizer, chance = tokenizers[name], random.Random(0)
    put_tokenizer(page, tokenizer)
    ranges = [
        (0, 0x7F),
        (0x20, 0x250),
        (0x370, 0x600),
        (0x900, 0xE80),
        (0x1F00, 0x3100),
        (0xA000, 0xD7FF),
        (0xE000, 0x2FFFF),
    ]
    made = ["".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(30)) for _ in range(300)]
    spaced = ["".join(chance.choice(" \n\t'a1!éß中🙂\u2003") for _ in range(40)) for _ in range(200)]
    texts = [*NASTY, *TEXTS, *made, *spaced]
    expected = encode(tokenizer, texts)
    found = page.evaluate("(texts) => texts.map((text) => tokenizer.encode(text))", texts)
    wrong = [text for text, one, other in zip(texts, found, expected, strict=True) if one != other]
    assert not wrong
    assert page.evaluate("() => tokenizer.texts") == [*vocabulary_strings(tokenizer)]
    assert page.evaluate("(all) => all.map((ids) => tokenizer.decode(ids))", expected) == texts


def test_every_character_is_in_the_class_that_the_tokenizer_s_pattern_gives_it(page, tokenizers):
    put_tokenizer(page, tokenizers["zoo"])
    cut = tokenizers["zoo"].backend_tokenizer.pre_tokenizer.pre_tokenize_str
    points = [point for point in range(0x20000) if not 0xD800 <= point < 0xE000][::7]
    for start in range(0, len(points), 2000):
        text = "".join(f"a{chr(point)}1{chr(point)}{chr(point)}!\n" for point in points[start : start + 2000])
        expected = [text[slice(*place)] for _, place in cut(text)]
        assert page.evaluate("(text) => tokenizer.cut(text)", text) == expected


@pytest.mark.parametrize("name", ["crate-2l-seed3", "gpt2-2l-seed3"])
def test_logits_and_activations_are_pytorch_s_within_1e_4_on_20_texts(page, name):
    run = Run(f"zoo/{name}")
    model = run.load_model()
    put(page, "model", "Model", inside(model))
    rounded(model)
    assert len({*TEXTS}) == 20
    for ids in encode(run.tokenizer, TEXTS):
        assert_alike(in_page(page, ids), in_torch(model, ids, site_named("auto", model)))


@pytest.mark.parametrize("name", ["crate-2l-seed3", "gpt2-2l-seed3"])
def test_steered_logits_are_pytorch_s_and_a_cache_changes_nothing(page, name):
    run = Run(f"zoo/{name}")
    model = run.load_model()
    put(page, "model", "Model", inside(model))
    rounded(model)
    site = site_named("auto", model)
    [ids] = encode(run.tokenizer, [" ".join(TEXTS[:4])])
    for texts in (
        ["1:37=2"],
        ["0:5+=1.5", "1:7*=0", "1:9<=0.01"],
        ["0:1=2@0,3,9", "1:3=-1@generated"],
        ["1:4=3 if 0:7>0.001"],
    ):
        edits = [read_edit(text, lambda _: site) for text in texts]
        expected = in_torch(model, ids, site, edits, 6)
        assert_alike(in_page(page, ids, edits=texts, prompt=6), expected)
        assert_alike(in_page(page, [ids[:6], *([one] for one in ids[6:])], edits=texts, prompt=6), expected)
        assert not np.allclose(expected[0], in_torch(model, ids, site)[0], atol=1e-3)


SHAPE: dict[str, Any] = {"vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 40}
NO_END: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
VARIANTS: dict[str, Any] = {
    "one step": CrateConfig(**SHAPE, ista_steps=1),
    "five steps": CrateConfig(**SHAPE, ista_steps=5, ista_step_size=0.3, ista_lambda=0.01),
    "skip": CrateConfig(**SHAPE, ista_skip=True),
    "untied dictionary": CrateConfig(**SHAPE, ista_tied=False, ista_expansion=2),
    "untied head": CrateConfig(**SHAPE, tie_word_embeddings=False),
    "relu": GPT2Config(**SHAPE, **NO_END, activation_function="relu"),
    "gelu_new": GPT2Config(**SHAPE, **NO_END),
    "gelu": GPT2Config(**SHAPE, **NO_END, activation_function="gelu", n_inner=40),
    "gelu_pytorch_tanh, untied": GPT2Config(
        **SHAPE, **NO_END, activation_function="gelu_pytorch_tanh", tie_word_embeddings=False, layer_norm_epsilon=1e-3
    ),
}
IDS = [*range(3, 60, 2)]


def made(config: Any):
    """A model with weights large enough that nothing is nearly linear."""
    model = build(config, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "site"),
    [(name, site) for name, config in VARIANTS.items() for site in BUILT_IN[config.model_type]],
)
def test_every_variant_and_site_is_pytorch_s(page, name, site):
    model = made(VARIANTS[name])
    family = model.config.model_type
    put(page, "model", "Model", inside(model))
    where = site_named(site, rounded(model))
    place, texts = places(family)[where.name], ["1:3+=2@1,5", "2:4=1 if 1:2>0.1"]
    expected = in_torch(model, IDS, where, [read_edit(text, lambda _: where) for text in texts])
    spelled = texts if place == "neurons" else [f"{site}/{text}" for text in texts]
    assert_alike(in_page(page, IDS, place, spelled), expected)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
def test_features_of_a_dictionary_are_read_and_edited_as_in_pytorch(page, kind, replace):
    model = made(VARIANTS["relu"])
    coder = SparseCoder(CoderConfig(kind, 96, 50, k=4), Origin())
    with torch.no_grad():
        for weight, size in ((coder.bias, 0.1), (coder.encoder_bias, 0.1), (coder.threshold, 0.2)):
            weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) * size)
        rounded(coder)
    put(page, "model", "Model", inside(rounded(model)))
    put(page, "coder", "Coder", coder_inside(coder))
    page.evaluate("() => { window.coders = { 1: coder }; }")
    own = site_named("auto", model)
    coded = CodedSite("sae", own.pattern, {1: coder}, {}, replace)
    texts = ["sae/1:7+=3", "sae/1:8=2 if 7>1", "1:5+=1", "sae/1:9*=0@2,3"]
    sites = {"sae": coded, None: own}
    expected = in_torch(model, IDS, own, [read_edit(text, lambda name: sites[name]) for text in texts])
    found = in_page(page, IDS, "neurons", texts, replace=replace)
    assert_alike(found, expected)
    with torch.no_grad(), read_site(model, Site("mlp", own.pattern), [1]) as seen:
        model(torch.tensor([IDS]))
    codes = coder.encode(seen[1][0]).detach().numpy()
    in_js = page.evaluate(
        "([x, t]) => [...coder.encode(Float32Array.from(x), t)]", [seen[1].flatten().tolist(), len(IDS)]
    )
    assert np.abs(np.array(in_js).reshape(codes.shape) - codes).max() < 1e-5


READABLE = (
    "1:37=4x",
    "1:37 =1q",
    "0:1=mean",
    "1:2+=-.5",
    "1:2*=0",
    "3:4<=1e3x",
    "3:4>=0@prompt",
    "1:2=3@0,4 if 0:1>0.5",
    "sae/bt16/1:5=2x",
    "1:5=1 @generated  if 12>-1",
)
REFUSED = (
    "",
    "1",
    "1:2",
    "1:2=",
    "1:2=x",
    "1:2=inf",
    "1:2*=2x",
    "1:2+=mean",
    "1:2=1@",
    "1:2=1@nowhere",
    "1:2=1 if 3:1>0",
    "1:2=1 if 1>",
    "-1:2=1",
    "1:2=1e39",
    "1:2=1;",
    "1:2==1",
)


def test_edits_are_read_as_on_the_command_line(page):
    tell = """(text) => { try { return Cratescope.inside.readEdit(text); } catch (error) { return error.message; } }"""
    for text in READABLE:
        found, edit = page.evaluate(tell, text), read_edit(text, lambda name: Site(name or "own", "x"))
        assert isinstance(found, dict), found
        assert (found["site"] or "own", found["layer"], found["index"]) == (edit.site.name, edit.layer, edit.index)
        assert (found["operation"], found["unit"], found["value"]) == (edit.operation, edit.unit, edit.value)
        assert (tuple(found["where"]) if isinstance(found["where"], list) else found["where"]) == edit.where
        assert found["when"] == (
            edit.when and {"index": edit.when.index, "number": edit.when.number, "layer": edit.when.layer}
        )
    for text in REFUSED:
        assert isinstance(page.evaluate(tell, text), str), text
        if text != "1:2=1e39":  # refused when it meets the model's numbers
            with pytest.raises(UserError):
                read_edit(text, lambda name: Site(name or "own", "x"))


def test_half_precision_is_read_bit_by_bit(page):
    every = np.arange(65536, dtype=np.uint16)
    found = page.evaluate(
        "() => [...Cratescope.inside.fromHalf(Uint16Array.from({ length: 65536 }, (_, i) => i))].map(String)"
    )
    expected = every.view(np.float16).astype(np.float64)
    assert np.array_equal(
        np.array([float(text.replace("Infinity", "inf")) for text in found]), expected, equal_nan=True
    )
