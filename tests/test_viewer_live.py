"""Live text and steering by the server: what the model itself says, whoever else asks at the same time."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig, SteerConfig
from cratescope.neurons.continuations import steer
from cratescope.neurons.records import layer_file, read_records
from cratescope.neurons.sites import read_site, site_named
from cratescope.run import Run
from cratescope.text.shards import TokenData
from cratescope.viewer.live import Asked, Live, Quantiles
from cratescope.viewer.loaded import Loaded, Models
from cratescope.viewer.opened import Opened
from viewer_server import Viewer, recorded, serving

TEXT = "the cat found three apples. a judge sold its name."


@pytest.fixture(scope="module")
def folder(runs_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(runs_folder, data_folder, tmp_path_factory.mktemp("live") / "runs")


@pytest.fixture(scope="module")
def viewer(folder: Path) -> Iterator[Viewer]:
    with serving(folder / "crate", folder / "gpt2") as found:
        yield found


def live(viewer: Viewer, **request: Any) -> list[dict[str, Any]]:
    answer = viewer.post("live", {"runs": ["crate"], "text": TEXT} | request)
    assert answer.status == 200, answer.body
    return answer.json["runs"]


@torch.no_grad()
def true_activations(run: Run) -> tuple[list[int], Any, Any]:
    model, ids = run.load_model().eval(), run.tokenizer(TEXT).input_ids
    with read_site(model, site_named("auto", model), [0]) as found:
        logits = model(torch.tensor([ids])).logits[0]
    return ids, logits.log_softmax(-1), found[0][0].numpy()


def test_tokens_come_with_the_models_own_log_probabilities_and_predictions(viewer: Viewer, folder: Path) -> None:
    [found] = live(viewer)
    ids, predicted, _ = true_activations(Run(folder / "crate"))
    assert "".join(found["tokens"]) == TEXT and len(found["tokens"]) == len(ids)
    own = [float(predicted[place, token]) for place, token in enumerate(ids[1:])]
    assert found["logprobs"][0] is None and found["logprobs"][1:] == pytest.approx(own, rel=1e-3)
    best = predicted[-1].max()
    assert found["top"][-1][0]["logprob"] == pytest.approx(float(best), rel=1e-3) and len(found["top"][0]) == 5


def test_units_are_sorted_by_their_largest_activation_on_the_chosen_tokens(viewer: Viewer, folder: Path) -> None:
    _, _, values = true_activations(Run(folder / "crate"))
    for tokens in ([], [3], [2, 5]):
        [found] = live(viewer, order={"by": "activation", "tokens": tokens}, limit=7)
        chosen = values[tokens].max(0) if tokens else values.max(0)
        best = np.sort(chosen)[::-1][:7]
        assert [one["key"] for one in found["neurons"]] == pytest.approx(best.tolist(), rel=1e-4)
        first = found["neurons"][0]
        assert first["values"] == pytest.approx(values[:, first["index"]].tolist(), rel=1e-3, abs=1e-6)
        assert found["total"] == 512


def test_units_are_sorted_by_their_share_of_their_own_maximum(viewer: Viewer, folder: Path) -> None:
    [found] = live(viewer, order={"by": "maximum", "tokens": []}, limit=5)
    records = read_records(layer_file(Run(folder / "crate").records("codes"), 0))
    keys = [max(one["values"]) / records[one["index"]].moments.maximum for one in found["neurons"]]
    assert [one["key"] for one in found["neurons"]] == pytest.approx(keys, rel=1e-3) and keys == sorted(keys)[::-1]


def test_surprise_is_the_quantile_in_the_units_own_histogram(viewer: Viewer, folder: Path) -> None:
    [found] = live(viewer, order={"by": "surprise", "tokens": [4]}, limit=20)
    records = read_records(layer_file(Run(folder / "crate").records("codes"), 0))
    for one in found["neurons"]:
        histogram, value = records[one["index"]].histogram, one["values"][4]
        assert histogram is not None
        below = histogram.count[histogram.high <= value].sum() / histogram.count.sum()
        upto = histogram.count[histogram.low <= value].sum() / histogram.count.sum()
        assert below - 1e-6 <= one["surprise"][4] <= upto + 1e-6
        assert one["key"] == pytest.approx(one["surprise"][4], abs=1e-5)
    keys = [one["key"] for one in found["neurons"]]
    assert keys == sorted(keys)[::-1]
    silent = [place for one in found["neurons"] for place, value in enumerate(one["values"]) if value == 0]
    assert all(
        one["surprise"][place] is None for one in found["neurons"] for place in silent if one["values"][place] == 0
    )


def test_quantiles_of_all_units_at_once_are_those_of_each_by_itself(folder: Path) -> None:
    opened = Opened(Run(folder / "gpt2"))
    site = opened.sites["mlp"]
    quantiles, records = Quantiles(site, 0), read_records(site.file(0))
    random = np.random.default_rng(0)
    rows = random.integers(0, 512, 400)
    largest = np.array([records[row].moments.maximum for row in rows.tolist()])
    values = random.uniform(-0.2, 1.2, 400) * largest
    for row, value, found in zip(rows.tolist(), values.tolist(), quantiles.of(rows, values).tolist(), strict=True):
        histogram = records[row].histogram
        assert histogram is not None
        ends = np.stack([histogram.low, histogram.high], 1).reshape(-1)
        total = np.cumsum(histogram.count)
        below = np.stack([total - histogram.count, total], 1).reshape(-1) / total[-1]
        wanted = 0.0 if value < ends[0] else float(np.interp(value, ends, below))
        assert found == pytest.approx(wanted, abs=1e-6)


def test_common_units_and_the_first_token_can_be_left_out(viewer: Viewer) -> None:
    [found] = live(viewer, hide={"density_above": 0.2, "first_token": True}, limit=50)
    assert found["neurons"] and all(one["density"] <= 0.2 for one in found["neurons"])
    [first] = live(viewer, order={"by": "activation", "tokens": [0]}, hide={"first_token": True}, limit=1)
    assert first["neurons"]


def test_a_sample_of_features_is_all_that_is_listed_of_a_site(viewer: Viewer, folder: Path) -> None:
    [found] = live(viewer, runs=["gpt2"], limit=1000)
    features = [one for one in found["neurons"] if one["site"] == "sae/small"]
    known = {*read_records(layer_file(Run(folder / "gpt2").records("sae/small"), 0))}
    assert features and {one["index"] for one in features} <= known and found["total"] == 512 + 96
    assert viewer.get("card", "gpt2", "sae/small", 0, features[0]["index"]).json["site"] == "sae/small"


def test_several_runs_are_read_side_by_side(viewer: Viewer) -> None:
    assert [one["run"] for one in live(viewer, runs=["gpt2", "crate", "gpt2"])] == ["gpt2", "crate"]
    assert [one["run"] for one in live(viewer, runs=[])] == ["crate", "gpt2"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"text": ""}, "the text has no token; give some text"),
        ({"text": "a cat " * 100}, r"tokens, crate reads at most 32 at once; give less"),
        ({"text": "a" * 20_001}, "the text has 20,001 characters; give at most 20,000"),
        ({"text": 5}, "text is a int"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        ({"text": "the cat", "runs": ["nobody"]}, "no run 'nobody'"),
        ({"text": "the cat", "runs": "crate"}, "runs is not a list"),
        (
            {"text": "the cat", "order": {"by": "beauty"}},
            "order.by 'beauty': choose from activation, maximum, surprise",
        ),
        ({"text": "the cat", "order": {"tokens": [99]}}, "order.tokens: crate reads"),
        ({"text": "the cat", "order": {"tokens": [-1]}}, "they are counted from 0"),
        ({"text": "the cat", "order": {"tokens": ["a"]}}, "holds a str"),
        ({"text": "the cat", "limit": 0}, "limit 0: has to be 1 or more"),
        ({"text": "the cat", "hide": {"density_above": "x"}}, "density_above is a str"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(viewer: Viewer, request_: dict[str, Any], message: str) -> None:
    answer = viewer.post("live", {"runs": ["crate"]} | request_)
    assert answer.status == 400 and len(answer.error.splitlines()) == 1
    assert re.search(message, answer.error), answer.error


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "<|endoftext|>", "🙂 ü \0 \u202e", "\n\n\t "])
def test_odd_text_comes_back_as_text(viewer: Viewer, text: str) -> None:
    answer = viewer.post("live", {"runs": ["crate"], "text": text})
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"


def steer_request(**changes: Any) -> dict[str, Any]:
    return {
        "run": "crate",
        "prompt": "the cat",
        "edits": ["0:3=40"],
        "tokens": 6,
        "temperature": 0.0,
        "seed": 0,
    } | changes


def written(events: list[dict[str, Any]], kind: str) -> str:
    return "".join(one["text"] for one in events if one["kind"] == kind)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_steering_streams_what_the_command_prints(viewer: Viewer, folder: Path, temperature: float) -> None:
    events = viewer.steer(**steer_request(temperature=temperature, seed=5))
    config = SteerConfig(
        folder / "crate", ("0:3=40",), prompt="the cat", tokens=6, temperature=temperature, seed=5, device="cpu"
    )
    wanted = steer(config)
    assert events[0] == {"kind": "start", "prompt_tokens": len(Run(folder / "crate").tokenizer("the cat").input_ids)}
    assert (written(events, "plain"), written(events, "steered")) == (wanted.plain, wanted.steered)
    end = events[-1]
    assert end["kind"] == "end" and end["kl_prompt"] == pytest.approx(wanted.kl_prompt, rel=1e-3)
    assert [one["text"] for one in end["rises"]] == [one.text for one in wanted.rises]
    assert end["kl_generated"] == pytest.approx(wanted.kl_generated, rel=1e-3)


@torch.no_grad()
def test_each_token_comes_with_its_log_probability_under_the_model_that_wrote_it(viewer: Viewer, folder: Path) -> None:
    events = viewer.steer(**steer_request(edits=["0:3*=1"], temperature=1.3, seed=2))
    run = Run(folder / "crate")
    model = run.load_model().eval()
    from cratescope.neurons.continuations import continuations

    ids, heard = run.tokenizer("the cat").input_ids, []
    config = SteerConfig(run.root, ("0:3*=1",), prompt="the cat", tokens=6, temperature=1.3, seed=2, device="cpu")
    continuations(config, run, model, lambda kind, token, logprob: heard.append((kind, token, logprob)))
    tokens = [token for kind, token, _ in heard if kind == "plain"]
    predicted = model(torch.tensor([[*ids, *tokens]])).logits[0].log_softmax(-1)
    own = [float(predicted[len(ids) - 1 + place, token]) for place, token in enumerate(tokens)]
    said = [one["logprob"] for one in events if one["kind"] == "plain"]
    assert said == pytest.approx(own, rel=1e-3)


def test_several_edits_units_and_places_are_taken_and_none_changes_nothing(viewer: Viewer) -> None:
    table = viewer.get("table", "crate", "codes").json
    [largest] = [one["values"] for one in table["columns"] if one["key"] == "maximum"]
    loud = largest.index(max(largest))
    events = viewer.steer(**steer_request(edits=[f"0:{loud}=4x", "0:5*=0 @generated", f"0:7+=1 if 0:{loud}>0"]))
    assert events[-1]["kind"] == "end", events[-1]
    events = viewer.steer(**steer_request(edits=[]))
    assert written(events, "plain") == written(events, "steered") and events[-1]["kl_prompt"] == 0


def test_features_are_steered_in_both_ways(viewer: Viewer) -> None:
    for sae in ("delta", "replace"):
        events = viewer.steer(**steer_request(run="gpt2", edits=["sae/small/0:3=5"], sae=sae))
        assert events[-1]["kind"] == "end", events[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "nobody"}, "no run 'nobody'"),
        ({"prompt": ""}, "no token; give some text"),
        ({"prompt": "the cat " * 40}, "crate reads at most 32 at once; give less"),
        ({"edits": ["0:3"]}, "character 4: expected one of"),
        ({"edits": ["0:9999=1"]}, "neuron 9999 is out of range"),
        ({"edits": ["sae/none/0:3=1"]}, "no sparse autoencoder 'none'"),
        ({"edits": ["0:3=1e38"]}, "logits are not finite"),
        ({"edits": "0:3=1"}, "edits is not a list"),
        ({"edits": ["0:3=1"] * 101}, "give at most 100"),
        ({"tokens": 0}, "tokens 0: has to be 1 or more"),
        ({"tokens": 100_000}, "tokens 100000: has to be 1000 or less"),
        ({"temperature": -1.0}, "temperature -1.0: has to be 0 or more"),
        ({"sae": "other"}, "sae 'other': choose delta or replace"),
        ({"seed": -1}, "seed -1"),
        ({"temperature": "hot"}, "temperature is a str"),
    ],
)
def test_what_cannot_be_steered_is_one_event_that_says_why(viewer: Viewer, changes: Any, message: str) -> None:
    events = viewer.steer(**steer_request(**changes))
    assert events[-1]["kind"] == "error" and message in events[-1]["error"]
    assert len(events[-1]["error"].splitlines()) == 1


def test_two_tabs_that_steer_at_once_both_get_the_right_text(viewer: Viewer) -> None:
    requests = [steer_request(edits=[f"0:3={value}"], tokens=8, temperature=1.0, seed=value) for value in (0, 10, 40)]
    alone = [viewer.steer(**one) for one in requests]
    with ThreadPoolExecutor(3) as tabs:
        together = list(tabs.map(lambda one: viewer.steer(**one), requests))
    assert together == alone


def test_steering_leaves_nothing_behind_in_the_model(viewer: Viewer) -> None:
    before = live(viewer, text="a judge")
    viewer.steer(**steer_request(edits=["0:3=40"]))
    after = live(viewer, text="the river") and live(viewer, text="a judge")
    assert [one["neurons"] for one in after] == [one["neurons"] for one in before]


def test_a_reader_that_goes_stops_the_writing(viewer: Viewer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", viewer.port, timeout=30)
    body = json.dumps(steer_request(tokens=28, prompt="a")).encode()
    connection.request("POST", "/api/steer", body, {"content-type": "application/json"})
    connection.getresponse().read(10)
    connection.close()
    start = time.monotonic()
    assert viewer.steer(**steer_request(tokens=1))[-1]["kind"] == "end"
    assert time.monotonic() - start < 30


def test_a_crowd_is_told_to_wait_and_the_server_goes_on(viewer: Viewer) -> None:
    hold = threading.Event()
    viewer.api.turns.do(lambda: hold.wait(30))
    with ThreadPoolExecutor(12) as tabs:
        answers = [tabs.submit(viewer.post, "live", {"runs": ["crate"], "text": f"the cat {n}"}) for n in range(12)]
        while viewer.api.turns._asked < 5:
            time.sleep(0.01)
        time.sleep(0.3)
        assert viewer.get("home").status == 200
        hold.set()
        statuses = sorted(one.result().status for one in answers)
    assert statuses[0] == 200 and 503 in statuses and {*statuses} == {200, 503}


def test_records_of_another_model_are_not_used_for_surprise(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "crate", tmp_path / "crate")
    manifest = Run(tmp_path / "crate").records("codes") / "manifest.json"
    manifest.write_text(manifest.read_text().replace(Run(folder / "crate").fingerprint(), "0" * 64))
    [found] = Live(Models()).answer([Opened(Run(tmp_path / "crate"))], Asked(TEXT))["runs"]
    assert "records of codes are of another model" in found["problems"][0]
    assert found["neurons"] and all(one["surprise"] is None and not one["recorded"] for one in found["neurons"])


def test_a_tokenizer_of_another_vocabulary_than_the_model_is_refused(
    folder: Path, tmp_path: Path, data_folder: Path
) -> None:
    from tokenizers import Tokenizer

    shutil.copytree(folder / "crate", tmp_path / "crate")
    path = tmp_path / "crate" / "model" / "tokenizer.json"
    (tmp_path / "crate" / "model" / "whole.json").unlink()
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["the cat"] + [f"odd{n}" for n in range(40)])
    tokenizer.save(str(path))
    with serving(tmp_path / "crate") as viewer:
        answer = viewer.post("live", {"runs": ["crate"], "text": "odd39 the cat"})
        assert answer.status == 400 and "its tokenizer has token" in answer.error
        events = viewer.steer(**steer_request(prompt="odd39"))
        assert events[-1]["kind"] == "error"


def test_an_adopted_model_is_read_and_steered(data_folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from cratescope.models.presets import build
    from test_adopt import FEW

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=32, **small, bos_token_id=None, eos_token_id=None)
    build(config, 0).save_pretrained(tmp_path / "model")
    TokenData.open(data_folder).tokenizer.save_pretrained(tmp_path / "model")
    collect(CollectConfig(tmp_path / "run", model=str(tmp_path / "model"), data=data_folder, **FEW, context=16))
    with serving(tmp_path / "run") as viewer:
        [found] = viewer.post("live", {"text": "the cat"}).json["runs"]
        assert found["neurons"][0]["site"] == "mlp" and found["neurons"][0]["surprise"] is None
        assert viewer.steer(**steer_request(run="run", edits=["1:3=2"]))[-1]["kind"] == "end"
        assert viewer.get("home").json["runs"][0]["family"] == "llama"


def test_all_activations_are_those_of_single_texts(folder: Path) -> None:
    loaded = Loaded(Opened(Run(folder / "gpt2")))
    tokens = np.array([[5, 9, 11, 30], [7, 7, 8, 100]])
    found = loaded.activations(tokens)
    for row in range(2):
        _, alone = loaded.read(tokens[row].tolist())
        for place, values in alone.items():
            assert np.allclose(found[place][4 * row : 4 * row + 4], values, atol=1e-5)
