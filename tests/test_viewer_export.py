"""Exported pages: what they hold, that it is what the server says, and that they work from disk and from any host."""

from __future__ import annotations

import base64
import functools
import gzip
import http.server
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

pytest.importorskip("starlette", reason="the viewer needs: pip install 'cratescope[view]'")
pytest.importorskip("uvicorn", reason="the viewer needs: pip install 'cratescope[view]'")

from chromium import chromium
from cratescope import cli
from cratescope.errors import UserError
from cratescope.models.configuration_crate import CrateConfig
from cratescope.run import Run
from cratescope.text.shards import TokenData
from cratescope.viewer import inside
from cratescope.viewer.alike import Alike
from cratescope.viewer.config import ViewConfig
from cratescope.viewer.data import Library
from cratescope.viewer.export import export
from cratescope.viewer.live import Asked, Live
from cratescope.viewer.loaded import Models
from cratescope.viewer.packed import FIRST, WIDTH, few, narrow
from cratescope.viewer.steering import settings, steer
from test_viewer_page import Tab
from viewer_runs import HOSTILE, MARKUP, NEURONS, hostile_run, viewer_runs

TEXT = "the court sold bread. a judge found Paris. 42 apples"
browser_test = pytest.mark.browser


@pytest.fixture(scope="module")
def runs(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return [*viewer_runs(folder, data_folder), hostile_run(folder)]


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    """An export of all of them."""
    path = export(ViewConfig(tuple(runs), export=tmp_path_factory.mktemp("out") / "site"))
    return path.parent


@pytest.fixture(scope="module")
def library(runs):
    return Library(runs)


@pytest.fixture(scope="module")
def models(library):
    """The models of the runs, with the weights that the export has."""
    found = Models("cpu")
    with torch.no_grad():
        for opened in library.opened.values():
            if opened.can_run is True:
                loaded = found.of(opened)
                coders = [coder for place in loaded.places for coder in getattr(place.site, "coders", {}).values()]
                for module in (loaded.model, *coders):
                    for weight in module.parameters():
                        weight.copy_(weight.half().float())
    return found


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def hosted(folder):
    """The address of the export on a web server that knows nothing of it."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(params=["from disk", "from a web server"])
def tab(browser, folder, hosted, request):
    """The export in a fresh browser; at its end nothing beyond the folder was asked for, and nothing went wrong."""
    address = (folder / "index.html").as_uri() if request.param == "from disk" else hosted
    with browser.new_context() as context:
        context.set_default_timeout(20_000)
        found = Tab(context.new_page(), address).go("#/")
        yield found
        root = address.removesuffix("index.html")
        assert [url for url in found.requests if not url.startswith((root, "data:,"))] == []
        assert found.trouble == []


@pytest.fixture(scope="module")
def page(browser, folder):
    """The data source of the export, from disk."""
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    return page


def ask(page: Any, method: str, *given: Any) -> Any:
    return page.evaluate("([method, given]) => Cratescope.source[method](...given)", [method, [*given]])


def values_in(folder: Path) -> dict[str, Any]:
    """What every script of an export hands over, by its name; numbers of models as bytes."""
    found = {}
    for path in (folder / "data").glob("*.js"):
        if match := re.fullmatch(r'Cratescope\.shard\("([\w.-]+)", "([\w+/=]*)"\);\n', path.read_text()):
            assert match[1] == path.stem
            raw = gzip.decompress(base64.b64decode(match[2]))
            found[path.stem] = raw if path.name.startswith(("model-", "coder-")) else json.loads(raw)
    return found


@browser_test
def test_home_and_tables_are_the_server_s(page, library):
    home, expected = ask(page, "home"), library.home()
    hostile = (
        [run["model"].pop("can_run") for run in home["runs"]],
        [run["model"].pop("can_run") for run in expected["runs"]],
    )
    assert home == json.loads(json.dumps(expected)) | {"notes": {}}
    assert hostile[0][:3] == [True] * 3 and isinstance(hostile[0][3], str)
    for opened in library.opened.values():
        for site in opened.sites:
            assert ask(page, "table", opened.name, site) == library.table(opened.name, site)


@browser_test
def test_every_card_is_the_server_s_with_fewer_and_narrower_windows(page, library):
    alike = Alike(library, Models("cpu"))
    for opened in library.opened.values():
        for site in opened.sites.values():
            for layer in site.layers:
                indices = site.units(layer).index.tolist()[:: 1 if opened.name == "crate" else 7]
                for full, thin in zip(
                    library.cards(opened.name, site.name, layer, indices),
                    library.cards(opened.name, site.name, layer, indices, few),
                    strict=True,
                ):
                    found = ask(page, "card", opened.name, site.name, layer, full["index"])
                    assert_close(found.pop("histogram"), full["histogram"])
                    assert_close(found.pop("quantiles"), full["quantiles"])
                    near = alike.nearest(opened.name, site.name, layer, full["index"])
                    assert found == narrow(thin) | {"nearest": near}


def assert_close(found, expected):
    """Equal but for the last digit, which is rounded by other means."""
    assert (found is None) == (expected is None)
    if found:
        assert found.keys() == expected.keys()
        assert all(found[name] == pytest.approx(expected[name], rel=2e-4) for name in found)


def test_a_thin_card_has_some_windows_of_every_kind_around_their_peaks(library):
    [full] = library.cards("crate", "codes", 1, [3])
    [thin] = [narrow(card) for card in library.cards("crate", "codes", 1, [3], few)]
    kinds = {window["kind"] for window in full["windows"]}
    assert {window["kind"] for window in thin["windows"]} == kinds >= {"top", "random", "quantile"}
    assert all(len([one for one in thin["windows"] if one["kind"] == kind]) <= n for kind, n in FIRST.items())
    for window in thin["windows"]:
        assert len(window["tokens"]) == len(window["activations"]) <= WIDTH
        assert window["activations"][window["peak"]] is not None
        assert any(
            one["excerpt"] == window["excerpt"]
            and one["start"] + one["peak"] == window["start"] + window["peak"]
            and one["tokens"][one["peak"]] == window["tokens"][window["peak"]]
            for one in full["windows"]
        )


@browser_test
def test_a_unit_that_is_not_there_is_named(page):
    for unit in (
        ("crate", "codes", 1, 999),
        ("crate", "codes", 7, 0),
        ("crate", "mlp", 0, 0),
        ("nobody", "codes", 0, 0),
    ):
        said = page.evaluate("(unit) => Cratescope.source.card(...unit).catch((error) => error.message)", [*unit])
        assert isinstance(said, str) and str(unit[3]) in said or "no s" in said or "no r" in said


@browser_test
@pytest.mark.parametrize("by", ["activation", "maximum", "surprise"])
def test_live_text_is_the_server_s(page, library, models, by):
    request = {"text": TEXT, "order": {"by": by, "tokens": []}, "limit": 40, "hide": {"first_token": True}}
    for hide, tokens in ((None, []), (0.5, [2, 5])):
        request["hide"]["density_above"], request["order"]["tokens"] = hide, tokens
        able = [opened for opened in library.opened.values() if opened.can_run is True]
        found = ask(page, "live", request)["runs"]
        expected = Live(models).answer(able, Asked.of(request))["runs"]
        assert [one["run"] for one in found] == [one["run"] for one in expected] == [one.name for one in able]
        for one, other in zip(found, expected, strict=True):
            assert_same_reading(one, json.loads(json.dumps(other)))


def assert_same_reading(found, expected):
    assert found.keys() == expected.keys()
    for name in ("tokens", "total", "problems"):
        assert found[name] == expected[name]
    assert found["logprobs"][0] is None
    assert found["logprobs"][1:] == pytest.approx(expected["logprobs"][1:], abs=1e-3)
    for one, other in zip(found["top"], expected["top"], strict=True):
        assert [row["logprob"] for row in one] == pytest.approx([row["logprob"] for row in other], abs=1e-3)
    assert [unit["key"] for unit in found["neurons"]] == pytest.approx(
        [unit["key"] for unit in expected["neurons"]], abs=1e-3
    )
    units = [{(one["site"], one["layer"], one["index"]): one for one in each["neurons"]} for each in (found, expected)]
    assert len(units[0].keys() & units[1].keys()) >= 0.9 * len(units[0])  # but for ties
    for unit in units[0].keys() & units[1].keys():
        one, other = units[0][unit], units[1][unit]
        assert (one["text"], one["density"], one["recorded"]) == (other["text"], other["density"], other["recorded"])
        assert one["values"] == pytest.approx(other["values"], abs=1e-3)
        both = [pair for pair in zip(one["surprise"] or [], other["surprise"] or [], strict=True) if None not in pair]
        assert [pair[0] for pair in both] == pytest.approx([pair[1] for pair in both], abs=1e-2)


COUNTED = """() => {
    const { prototype } = Cratescope.inside.Model, { run } = prototype;
    window.runs = 0;
    prototype.run = function (...given) { window.runs += 1; return run.apply(this, given); };
}"""


@browser_test
def test_clicking_tokens_ranks_the_same_reading_again(page):
    request = {"runs": ["gpt2"], "text": f"{TEXT} again", "order": {"by": "activation", "tokens": []}}
    page.evaluate(COUNTED)
    first = ask(page, "live", request)["runs"][0]["neurons"]
    passes = page.evaluate("window.runs")
    request["order"]["tokens"] = [3]
    assert ask(page, "live", request)["runs"][0]["neurons"] != first
    assert page.evaluate("window.runs") == passes > 0


EVENTS = """async (request) => {
    const events = [];
    await Cratescope.source.steer(request, (event) => events.push(event));
    return events;
}"""
STEER: dict[str, Any] = {"prompt": "the court sold", "tokens": 8, "temperature": 0, "seed": 0}


@browser_test
@pytest.mark.parametrize(
    ("run", "edits", "sae"),
    [
        ("crate", ["1:3=4x", "0:2+=0.5 if 0:3>0"], "delta"),
        ("crate", ["sae/small/1:5=3", "1:3=1q@generated"], "delta"),
        ("crate", ["sae/small/1:5=3"], "replace"),
        ("gpt2", ["1:3=mean", "1:7*=40", "residual/0:4<=-1@0,1"], "delta"),
        ("gpt2", [], "delta"),
    ],
)
def test_steering_is_the_server_s_token_by_token(page, library, models, run, edits, sae):
    request = STEER | {"run": run, "edits": edits, "sae": sae}
    found, expected = page.evaluate(EVENTS, request), []
    opened = library.opened[run]
    steer(settings(opened, request), opened, models, expected.append, threading.Event())
    assert found[0] == expected[0] == {"kind": "start", "prompt_tokens": found[0]["prompt_tokens"]}
    for kind in ("plain", "steered"):
        texts = ["".join(one["text"] for one in events if one["kind"] == kind) for events in (found, expected)]
        assert texts[0] == texts[1]
        logprobs = [[one["logprob"] for one in events if one["kind"] == kind] for events in (found, expected)]
        n = found[-1]["generated"]  # what is left of a character may come as one more event
        assert logprobs[0][:n] == pytest.approx(logprobs[1][:n], abs=1e-3)
    end, other = found[-1], expected[-1]
    assert end.keys() == other.keys()
    assert end["generated"] == other["generated"]
    for name in ("kl_prompt", "kl_generated"):
        assert end[name] == pytest.approx(other[name], abs=1e-3)
    for name in ("rises", "falls"):
        assert [row["change"] for row in end[name]] == pytest.approx([row["change"] for row in other[name]], abs=1e-3)
        assert end[name][0].keys() == other[name][0].keys()


@browser_test
def test_drawn_text_depends_on_the_seed_alone_and_no_edit_changes_none(page):
    request = STEER | {"run": "gpt2", "edits": [], "temperature": 1.5}
    first, again, other = (page.evaluate(EVENTS, request | {"seed": seed}) for seed in (1, 1, 2))
    plain, steered = ("".join(one["text"] for one in first if one["kind"] == kind) for kind in ("plain", "steered"))
    assert first == again != other and plain == steered and first[-1]["kl_generated"] == 0


@browser_test
def test_steering_stops_when_it_is_told_to(page):
    code = """async (request) => {
        const control = new AbortController();
        let n = 0;
        const heard = ({ kind }) => { if (kind === "plain" && ++n === 3) control.abort(); };
        return Cratescope.source.steer(request, heard, control.signal).catch((error) => [n, error.name]);
    }"""
    assert page.evaluate(code, STEER | {"run": "gpt2", "edits": ["1:3=1"], "tokens": 40}) == [3, "AbortError"]


@browser_test
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edits": ["1:3"]}, "expected"),
        ({"edits": ["9:3=1"]}, "layer 9 is out of range"),
        ({"edits": [f"1:{NEURONS}=1"]}, "out of range"),
        ({"edits": ["nowhere/1:3=1"]}, "no site nowhere"),
        ({"edits": ["residual/1:3=1x"]}, "not in the records"),
        ({"edits": ["1:3=1e38", "1:3*=1e30"]}, "not finite"),
        ({"prompt": ""}, "no token"),
        ({"prompt": "a" * 20_001}, "20,000"),
        ({"tokens": 1000}, "more than the 64"),
        ({"run": HOSTILE}, "no model"),
    ],
)
def test_steering_says_in_one_line_what_is_wrong(page, change, said):
    code = "(request) => Cratescope.source.steer(request, () => {}).then(() => 'nothing', (error) => error.message)"
    found = page.evaluate(code, STEER | {"run": "crate", "edits": ["1:3=1"]} | change)
    assert said in found and "\n" not in found


@browser_test
def test_words_of_explanations_and_windows_are_found(page, library):
    table = library.table("crate", "codes")
    word = next(word for text in table["text"] for word in re.findall(r"[a-z]{4,}", text))
    found = ask(page, "search", word.upper())
    said = {
        (hit["layer"], hit["index"])
        for hit in found["hits"]
        if hit["field"] == "explanation" and hit["run"] == "crate" and hit["site"] == "codes"
    }
    places = zip(table["layer"], table["index"], table["text"], strict=True)
    assert said == {(layer, index) for layer, index, text in places if re.search(rf"\b{word}", text.lower())}
    for query in ("a judge", "jud", "bread.", "42 "):
        hits = [hit for hit in ask(page, "search", query)["hits"] if hit["field"] == "window"]
        assert hits
        for hit in hits:
            assert (
                all(hit["snippet"][first:last].lower() == query.strip().lower() for first, last in hit["marks"])
                and hit["marks"]
            )
    assert ask(page, "search", "xyzzy") == ask(page, "search", " ") == {"hits": [], "truncated": False}


@browser_test
def test_twins_are_the_server_s(page, library):
    alike = Alike(library, Models("cpu"))
    found = {(*one, *other): twins for one, other, twins in alike.twins()}
    assert ("crate", "codes", "gpt2", "mlp") in found
    for names, twins in found.items():
        assert ask(page, "twins", *names) == json.loads(json.dumps(twins))


@browser_test
def test_home_card_search_live_and_steering_work_from_disk_and_from_any_host(tab):
    tab.see("h1, h2", "Neurons")
    tab.go("#/n/crate/codes/1/3")
    tab.see("header.top", "layer 1")
    tab.go("#/?q=judge")
    tab.see("mark", "judge")
    tab.go("#/live?text=the+court+sold+bread")
    tab.see("main", "court")
    tab.see("a", "1:")
    tab.go("#/steer?run=crate&edit=1%3A3%3D4x&prompt=the+court")
    assert tab.page.evaluate("Cratescope.source.capabilities.steer") is True


@browser_test
def test_hostile_names_tokens_and_explanations_are_text(tab):
    for screen in (
        "#/",
        f"#/n/{quote(HOSTILE, safe='')}/codes/0/1",
    ):
        tab.go(screen)
        assert tab.page.evaluate("window.hacked") is None
    assert tab.page.locator("main script, main img").count() == 0
    assert MARKUP in tab.page.inner_text("main")


def test_names_of_files_are_safe_and_differ_by_more_than_capitals(folder):
    names = [path.name for path in (folder / "data").iterdir()]
    assert all(re.fullmatch(r"[\w.-]+\.js", name, re.ASCII) for name in names)
    assert len({name.lower() for name in names}) == len(names)


def test_nothing_of_the_machine_is_in_an_export(folder, runs, data_folder):
    every = [raw if isinstance(raw, bytes) else json.dumps(raw).encode() for raw in values_in(folder).values()]
    every += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for path in (runs[0].parent, data_folder, folder, Path.home()):
        assert not any(str(path).encode() in raw for raw in every), path


def test_a_folder_of_other_things_is_refused_and_an_earlier_export_replaced(runs, tmp_path, capsys):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    file = tmp_path / "file"
    file.write_text("x")
    alike = tmp_path / "alike"  # a manifest of nothing of ours
    (alike / "data").mkdir(parents=True)
    (alike / "data" / "manifest.js").write_text("")
    for path in (other, file, alike):
        with pytest.raises(UserError, match="something else than an earlier export"):
            export(ViewConfig((runs[3],), export=path))
    assert (other / "letter.txt").read_text() == "dear"
    out = tmp_path / "out"
    out.mkdir()
    cli.run_and_exit(["view", str(runs[3]), "--export", str(out)])
    (out / "data" / "old.js").write_text("old")
    export(ViewConfig((runs[3],), export=out))
    assert not (out / "data" / "old.js").exists() and (out / "index.html").is_file()
    assert capsys.readouterr().out.strip() == str(out / "index.html")
    (out / "CNAME").write_text("neurons.example.org")  # it would be lost
    with pytest.raises(UserError, match="something else than an earlier export"):
        export(ViewConfig((runs[3],), export=out))
    assert (out / "CNAME").exists()


def test_an_export_that_fails_leaves_the_earlier_one_and_nothing_else(runs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(ViewConfig((runs[3],), export=out))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(Library, "cards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(ViewConfig((runs[3],), export=out))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def model_of(folder: Path, run: str) -> Any:
    text = (folder / "data" / "manifest.js").read_text().removeprefix("window.CRATESCOPE_EXPORT = ").removesuffix(";\n")
    return next(one["model"] for one in json.loads(text)["runs"] if one["name"] == run)


def test_models_may_be_left_out(runs, tmp_path):
    export(ViewConfig((runs[1],), export=tmp_path / "out", model=False))
    assert "without its models" in model_of(tmp_path / "out", "gpt2")
    assert not [*(tmp_path / "out" / "data").glob("model-*")]


def adopted(runs: list[Path], folder: Path, model: Any, tokenizer: Any) -> Run:
    """A run of the GPT-2's records with another model."""
    shutil.copytree(runs[1], folder)
    shutil.rmtree(folder / "model")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return Run(folder)


def test_why_a_page_has_not_a_model_is_said_in_one_sentence(runs, data_folder, tmp_path, monkeypatch):
    tokenizer = TokenData.open(data_folder).tokenizer
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    llama = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    kinds = {
        "llama": (LlamaConfig(**shape, **llama), "llama model"),
        "silu": (GPT2Config(**shape, **small, activation_function="silu"), "activation function silu"),
        "scaled": (
            GPT2Config(**shape, **small, scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx",
        ),
        "sparse": (CrateConfig(**shape, **small, feed_forward="lista"), "feed_forward"),
        "lagging": (CrateConfig(**shape, **small, lag=True), "lag"),
    }
    for name, (config, said) in kinds.items():
        run = adopted(runs, tmp_path / name, AutoModelForCausalLM.from_config(config), tokenizer)
        assert said in inside.refusal(run)
    model = AutoModelForCausalLM.from_config(GPT2Config(**shape, **small))
    fine = adopted(runs, tmp_path / "fine", model, tokenizer)
    assert inside.refusal(fine) is None
    path = fine.model / "tokenizer.json"
    text = path.read_text()
    path.write_text(
        text.replace('"add_prefix_space":false', '"add_prefix_space":true').replace(
            '"add_prefix_space": false', '"add_prefix_space": true'
        )
    )
    assert "byte-level BPE" in inside.refusal(Run(fine.root))
    path.write_text(text)
    monkeypatch.setattr(inside, "LARGEST", 1000)
    assert "weights, pages run up to 1,000" in inside.refusal(Run(fine.root))


def test_weights_beyond_float16_are_left_out_with_a_sentence(runs, data_folder, tmp_path):
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.transformer.wpe.weight[3, 3] = 1e5
    run = adopted(runs, tmp_path / "large", model, TokenData.open(data_folder).tokenizer)
    export(ViewConfig((run.root,), export=tmp_path / "out"))
    assert "float16" in model_of(tmp_path / "out", "large")
