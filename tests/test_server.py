"""The server engine against a real server on this machine that misbehaves as it is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig, JudgeConfig, SimulateConfig
from cratescope.explain.controls import OWN
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained
from cratescope.explain.judge import judge
from cratescope.explain.simulate import simulate
from cratescope.llm import server
from cratescope.llm.answers import EMPTY_ANSWER, REFUSED
from cratescope.llm.cache import AnswerCache
from cratescope.llm.config import LLMConfig
from cratescope.llm.interface import LanguageModel, NoAnswer, RefusedError
from cratescope.llm.local import LocalLLM
from cratescope.llm.open import llm_identity, open_llm
from cratescope.neurons.records import (
    layer_file,
    read_records,
    write_records,
)
from cratescope.run import Run
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score
from cratescope.text.tokenizer import train_bpe
from kept_files import drop, read_explanations, read_judgements, read_scores, read_simulations
from scripted import ScriptedLLM
from test_explain import DEAD_INDEX, N_NEURONS, first_word, make_run, settings_for
from test_judge import silenced

KEY = "sk-very-secret"
# POST /script sets what the next requests meet; GET /log tells what was asked. An answer is "<n characters>!\nmore".
SERVER = """
import json, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

script, log, lock, busy = [], [], threading.Lock(), [0, 0]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, body, status=200, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        with lock:
            self.send(json.dumps({"log": log, "most": busy[1]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/script":
            with lock:
                script[:], log[:], busy[1] = body, [], 0
            return self.send(b"")
        with lock:
            step = script.pop(0) if script else {}
            log.append({"path": self.path, "body": body, "key": self.headers["Authorization"], "time": time.time()})
            busy[0] += 1
            busy[1] = max(busy)
        time.sleep(step.get("sleep", 0))
        with lock:
            busy[0] -= 1
        if step.get("close"):
            return self.connection.close()
        answer = json.dumps(step.get("json", self.answer(body))).encode()
        if "text" in step:
            answer = step["text"].encode()
        if step.get("refuses") in body:
            return self.send(f"what is {step['refuses']}?".encode(), 422)
        if "status" in step:
            answer = ("bad key " + str(self.headers["Authorization"])).encode()
        if step.get("cut"):
            return self.send(answer[: len(answer) // 2], length=len(answer) if step["cut"] == "body" else None)
        self.send(answer, step.get("status", 200), **step.get("headers", {}))

    def answer(self, body):
        if "messages" in body:
            return {"choices": [{"message": {"content": f" {len(body['messages'][-1]['content'])}!\\nmore"}}]}
        if "logprobs" in body:
            n = len(body["prompt"]) + 1 if body.get("echo") else 1
            tops = [{f"token_id:{token}": -1.0 - token for token in range(3)} for _ in range(n)]
            return {"choices": [{"text": "", "logprobs": {"top_logprobs": [None, *tops[1:]] if n > 1 else tops}}]}
        return {"choices": [{"text": f" {len(body['prompt'])}!\\nmore"}]}


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        pass


server = Server(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Serving:
    """The process, and how to talk to it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self._control = f"http://127.0.0.1:{port}"

    def script(self, *steps: dict[str, Any]) -> None:
        httpx2.post(f"{self._control}/script", json=steps)

    def log(self) -> list[dict[str, Any]]:
        return httpx2.get(f"{self._control}/log").json()["log"]

    def most_at_once(self) -> int:
        return httpx2.get(f"{self._control}/log").json()["most"]


@pytest.fixture(scope="module")
def process() -> Iterator[Serving]:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        yield Serving(int(running.stdout.readline()))
        running.kill()


@pytest.fixture
def serving(process: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    monkeypatch.setenv("CRATESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    process.script()
    return process


@pytest.fixture
def config(serving: Serving) -> LLMConfig:
    return LLMConfig(llm=serving.url, llm_model="tiny", llm_timeout=5)


def opened(config: LLMConfig) -> LanguageModel:
    open_llm.cache_clear()
    return open_llm(config)


def generated(llm: LanguageModel, *prompts: str) -> list[str]:
    return llm.generate(llm.encode("pre"), [llm.encode(prompt) for prompt in prompts], 60, "\n")


def test_generation_asks_for_the_text_itself_and_cuts_the_answer(serving: Serving, config: LLMConfig) -> None:
    assert generated(opened(config), "fix", "änderung") == [" 6!", " 11!"]
    asked = serving.log()
    assert sorted(one["body"]["prompt"] for one in asked) == ["prefix", "preänderung"]
    wanted = {"model": "tiny", "max_tokens": 60, "temperature": 0, "seed": 0, "stop": ["\n"]}
    assert all(one["body"] | wanted == one["body"] for one in asked)
    assert {(one["path"], one["key"]) for one in asked} == {("/v1/completions", f"Bearer {KEY}")}


def test_a_chat_model_is_asked_to_continue(serving: Serving, config: LLMConfig) -> None:
    assert generated(opened(replace(config, llm_chat=True)), "fix") == ["6!"]
    (asked,) = serving.log()
    assert asked["path"] == "/v1/chat/completions"
    assert asked["body"]["messages"][-1] == {"role": "user", "content": "prefix"}


def test_no_answer_is_paid_for_twice(serving: Serving, config: LLMConfig) -> None:
    first = generated(opened(config), "a", "b", "a")
    assert len(serving.log()) == 2
    assert generated(opened(config), "b", "a") == first[1:]
    assert len(serving.log()) == 2
    generated(opened(replace(config, llm_model="other")), "a")
    assert len(serving.log()) == 3


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 500},
        {"status": 503},
        {"status": 524},
        {"close": True},
        {"text": "<html>not JSON</html>"},
        {"text": "[]"},
        {"json": {"choices": []}},
        {"json": {"choices": [{"text": None}]}},
        {"cut": "body"},
        {"cut": "json"},
        {"sleep": 1.5},
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(serving: Serving, config: LLMConfig, trouble: dict[str, Any]) -> None:
    serving.script(trouble, trouble)
    assert generated(opened(replace(config, llm_timeout=1)), "fix") == [" 6!"]
    assert len(serving.log()) == 3


def test_retry_after_is_honoured(serving: Serving, config: LLMConfig) -> None:
    serving.script({"status": 429, "headers": {"Retry_After": "0.7"}})
    assert generated(opened(config), "fix") == [" 6!"]
    first, second = (one["time"] for one in serving.log())
    assert second - first >= 0.7


def test_what_keeps_failing_is_one_line_with_the_address_and_loses_no_answer(
    serving: Serving, config: LLMConfig
) -> None:
    serving.script(*[{"status": 500}] * server.TRIES)
    llm = opened(replace(config, llm_concurrency=1))
    with pytest.raises(UserError, match=rf"{serving.url}/completions: status 500 .*, {server.TRIES} times") as caught:
        generated(llm, "c")
    assert "\n" not in str(caught.value)
    serving.script({}, *[{"text": "garbage"}] * server.TRIES)
    with pytest.raises(UserError, match="not OpenAI's JSON"):
        generated(llm, "a", "b")
    serving.script()
    assert generated(llm, "a", "b") == [" 4!", " 4!"]
    assert [one["body"]["prompt"] for one in serving.log()] == ["preb"]


@pytest.mark.parametrize(
    ("status", "fix"), [(401, r"right key in \$OPENAI_API_KEY"), (404, "--llm-model"), (400, "400")]
)
def test_a_refusal_is_not_repeated_and_never_shows_the_key(
    serving: Serving, config: LLMConfig, status: int, fix: str, caplog: pytest.LogCaptureFixture
) -> None:
    serving.script({"status": status})
    llm = opened(config)
    with caplog.at_level(0), pytest.raises(UserError, match=fix) as caught:
        generated(llm, "fix")
    assert len(serving.log()) == 1
    assert "bad key" in str(caught.value)
    assert KEY not in str(caught.value) + repr(llm.__dict__["_config"]) + caplog.text
    assert all(KEY.encode() not in path.read_bytes() for path in Path(config_cache()).rglob("*") if path.is_file())


def config_cache() -> str:
    from cratescope.text.offline import cache

    return str(cache())


def test_a_server_that_is_down_is_named(serving: Serving, config: LLMConfig) -> None:
    down = re.sub(r":\d+/", ":9/", config.llm)
    with pytest.raises(UserError, match=rf"{down}/completions: no answer \(ConnectError"):
        generated(opened(replace(config, llm=down)), "fix")


def test_requests_are_under_way_together_and_no_more_than_allowed(serving: Serving, config: LLMConfig) -> None:
    serving.script(*[{"sleep": 0.2}] * 9)
    start = time.monotonic()
    answers = generated(opened(replace(config, llm_concurrency=3)), *(f"{n:0{n}}" for n in range(1, 10)))
    assert time.monotonic() - start < 9 * 0.2
    assert answers == [f" {3 + n}!" for n in range(1, 10)]
    assert serving.most_at_once() == 3


def test_requests_a_minute_are_limited(serving: Serving, config: LLMConfig) -> None:
    generated(opened(replace(config, llm_per_minute=300)), "a", "b", "c")
    times = sorted(one["time"] for one in serving.log())
    assert times[-1] - times[0] >= 0.39


def test_an_address_with_a_key_and_one_without_a_model_are_refused(config: LLMConfig) -> None:
    with pytest.raises(UserError, match="does not belong in an address") as caught:
        opened(replace(config, llm="https://me:pass@host/v1"))
    assert "pass" not in str(caught.value)
    with pytest.raises(UserError, match="--llm-model"):
        opened(replace(config, llm_model=""))


def test_the_whole_vocabulary_is_refused_with_what_to_do(config: LLMConfig) -> None:
    with pytest.raises(UserError, match="--simulator all-at-once"):
        opened(config).next_logprobs([], [[1]])
    with pytest.raises(UserError, match="--llm-tokenizer"):
        opened(config).slot_logprobs([], [[1, 2]], [[1]], [1])


def test_files_are_named_after_the_model_and_not_the_address(config: LLMConfig) -> None:
    llm = opened(config)
    assert isinstance(llm, LanguageModel)
    assert llm_identity(config, None) == llm_identity(config, llm) == {"llm": "tiny", "dtype": "served"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalLLM, Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_bpe(iter(["the dog saw the cat, 10 boats"] * 8), 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    return LocalLLM(model, tokenizer, "tiny"), folder


def as_a_server_would(llm: LocalLLM, body: dict[str, Any], by_text: bool) -> dict[str, Any]:
    """The answer of vLLM to a request for log-probabilities, from a local model."""
    logits = llm.model(input_ids=torch.tensor([body["prompt"]])).logits[0].detach().log_softmax(-1)
    told = [None, *logits] if body.get("echo") else [logits[-1]]
    tops = []
    for row in told:
        best = [] if row is None else row.argsort(descending=True).tolist()
        names = [llm.tokenizer.decode([token]) if by_text else f"token_id:{token}" for token in best]
        tops.append({name: float(row[token]) for name, token in zip(names, best, strict=True)} if best else None)
    return {"choices": [{"text": "", "logprobs": {"top_logprobs": tops}}]}


@pytest.mark.parametrize("by_text", [False, True])
def test_log_probabilities_in_a_prompt_are_those_of_the_model(
    serving: Serving, config: LLMConfig, local: tuple[LocalLLM, Path], by_text: bool
) -> None:
    llm = opened(replace(config, llm_tokenizer=str(local[1]), llm_concurrency=1))
    prefix, prompt, slots = llm.encode("the dog"), llm.encode("saw 7 of 10 cats"), [1, 3, 5]
    assert prefix == local[0].encode("the dog")
    choices = [[ids[0]] for ids in map(llm.encode, "123")] + [llm.encode("1") + llm.encode("0")]
    expected = local[0].slot_logprobs(prefix, [prompt], [slots], choices)[0]
    # What will be asked is seen in a first round, and answered in a second.
    with pytest.raises(UserError):
        serving.script(*[{"status": 400}])
        llm.slot_logprobs(prefix, [prompt], [slots], choices)
    bodies = [{"prompt": prefix + prompt[: max(slots)], "echo": True}]
    bodies += [{"prompt": [*prefix, *prompt[:slot], *llm.encode("1")]} for slot in slots]
    assert serving.log()[0]["body"].items() >= bodies[0].items()
    serving.script(*({"json": as_a_server_would(local[0], body, by_text)} for body in bodies))
    found = llm.slot_logprobs(prefix, [prompt], [slots], choices)[0]
    assert len(serving.log()) == len(bodies)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_server_that_does_not_know_an_option_of_vllm_is_asked_without_it(
    serving: Serving, config: LLMConfig, local: tuple[LocalLLM, Path]
) -> None:
    llm = opened(replace(config, llm_tokenizer=str(local[1]), llm_concurrency=1))
    prompts, choices = [llm.encode("the dog"), llm.encode("10 cats")], llm.encode("a")
    tops = {"top_logprobs": [{"a": -1.5, " a": -2.0}]}
    strict = {"refuses": server.BY_ID, "json": {"choices": [{"text": "", "logprobs": tops}]}}
    serving.script(*[strict] * 3)
    found = llm.slot_logprobs([5], prompts, [[len(prompt)] for prompt in prompts], choices)
    assert [rows.tolist() for rows in found] == [[[-1.5]]] * 2
    assert [server.BY_ID in one["body"] for one in serving.log()] == [True, False, False]


def test_a_choice_that_is_not_among_the_likeliest_has_no_probability(
    serving: Serving, config: LLMConfig, local: tuple[LocalLLM, Path]
) -> None:
    llm = opened(replace(config, llm_tokenizer=str(local[1])))
    found = llm.slot_logprobs([5], [[6, 7, 8]], [[1, 3]], [1, 2, 77])[0]
    assert found.tolist() == [[-2, -3, -np.inf]] * 2


@pytest.mark.parametrize("told", [{" yes": -1.0, "yes": -3.0}, {"▁yes": -1.0, "yes": -3.0}, {"yes": -1.0, "no": -2.0}])
def test_a_token_is_found_under_any_name_that_servers_give_it(
    serving: Serving, config: LLMConfig, tmp_path: Path, told: dict[str, float]
) -> None:
    pieces = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "yes": 2, "▁yes": 3, "no": 4}, [("▁", "yes")]))
    pieces.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", eos_token="<unk>").save_pretrained(tmp_path)
    llm = opened(replace(config, llm_tokenizer=str(tmp_path)))
    serving.script({"json": {"choices": [{"text": "", "logprobs": {"top_logprobs": [told]}}]}})
    assert llm.slot_logprobs([1], [[2]], [[1]], [3])[0].tolist() == [[-1.0]]


def test_a_damaged_tokenizer_of_the_served_model_is_one_line(config: LLMConfig, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": 7}')
    with pytest.raises(UserError, match="--llm-tokenizer .*: cannot load it") as error:
        opened(replace(config, llm_tokenizer=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_server_without_log_probabilities_of_the_prompt_is_told_apart(
    serving: Serving, config: LLMConfig, local: tuple[LocalLLM, Path]
) -> None:
    llm = opened(replace(config, llm_tokenizer=str(local[1])))
    for logprobs, message in ((None, "gives no log-prob"), ({"top_logprobs": [{"a": -1.0}]}, r"itself \(echo\)")):
        serving.script({"json": {"choices": [{"text": "", "logprobs": logprobs}]}})
        with pytest.raises(UserError, match=message):
            llm.slot_logprobs([5], [[6, 7, 8]], [[1, 3]], [1])
    wrong = {"top_logprobs": [{"a": float(n > 0)} for n in range(5)]}
    serving.script(*[{"json": {"choices": [{"text": "", "logprobs": wrong}]}}] * server.TRIES)
    with pytest.raises(UserError, match="not a log-probability"):
        llm.slot_logprobs([5], [[6, 7, 8]], [[1, 3]], [1])


def test_several_workers_share_the_cache_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite3"
    requests = [{"prompt": number} for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda request: AnswerCache(path).store(request, request["prompt"]), requests))
    assert AnswerCache(path).find([*requests, {"prompt": "new"}]) == [*range(40), None]
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match=rf"{path}: the cache of answers cannot be used .*; delete it"):
        AnswerCache(path)


def test_an_answer_stored_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite3"
    code = f"""
import os, pathlib, signal
from cratescope.llm.cache import AnswerCache
cache = AnswerCache(pathlib.Path({str(path)!r}))
cache.store({{"prompt": 1}}, "kept")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert json.dumps(AnswerCache(path).find([{"prompt": 1}])) == '["kept"]'


Reply = tuple[int, Any, dict[str, str]]
Quirk = Callable[[dict[str, Any]], Reply | dict[str, Any] | bytes]


class Quirky:
    """A server in this process that answers as a function says, and what it was asked."""

    def __init__(self, quirk: Quirk) -> None:
        asked: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append(body)
                found = quirk(body)
                status, answer, headers = found if isinstance(found, tuple) else (200, found, {})
                if isinstance(answer, (dict, list)):
                    answer = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [answer] if isinstance(answer, bytes) else answer:
                    self.wfile.write(piece)
                    self.wfile.flush()

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass

        self.asked = asked
        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


Start = Callable[[Quirk], Quirky]
PROTOCOL: dict[str, Any] = {"protocols": ("top-and-random",)}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts servers; those started before answer no more when the test ends."""
    monkeypatch.setenv("CRATESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(server, "FIRST_WAIT", 0.001)
    started: list[Quirky] = []

    def one(quirk: Quirk) -> Quirky:
        started.append(Quirky(quirk))
        return started[-1]

    yield one
    for running in started:
        running.close()


def asking(running: Quirky, **changes: Any) -> LLMConfig:
    return replace(LLMConfig(llm=running.url, llm_model="m", llm_timeout=5, llm_chat=True), **changes)


def said(text: Any, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """An answer that holds a text for both ways of asking."""
    return {"choices": [{"text": text, "message": {"content": text} | message, "finish_reason": finish}]}


FINE = said(" a river")
FILTERED = {"error": {"message": "The prompt was filtered", "code": "content_filter", "param": "prompt"}}


def refusing(option: str, status: int, body: Any) -> Quirk:
    return lambda asked: (status, body, {}) if option in asked else FINE


def named(option: str, message: str = "Unsupported parameter: '{}' is not supported") -> dict[str, Any]:
    return {"error": {"message": message.format(option), "param": option}}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("option", "status", "body"),
    [
        ("max_tokens", 400, named("max_tokens", "'{}' is not supported; use 'max_completion_tokens' instead")),
        ("temperature", 400, named("temperature")),
        ("seed", 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs"}]}),
        ("seed", 500, b"seed is not supported"),
        ("seed", 200, {"error": {"message": "unknown field: seed"}}),
        ("stop", 400, named("stop")),
    ],
    ids=str,
)
def test_a_refused_option_is_left_out_and_said_once(
    start: Start, capsys: pytest.CaptureFixture[str], chat: bool, option: str, status: int, body: Any
) -> None:
    running = start(refusing(option, status, body))
    llm = opened(asking(running, llm_chat=chat))
    assert [str(answer).strip() for answer in generated(llm, *"abcdef")] == ["a river"] * 6
    assert [str(answer).strip() for answer in generated(llm, "g")] == ["a river"]
    refused = option in running.asked[0]
    assert capsys.readouterr().err.count(f"the server refuses {option}") == refused
    assert option not in running.asked[-1]
    assert running.asked[-1].get("max_completion_tokens") == (60 if option == "max_tokens" else None)


def test_options_refused_one_after_the_other_come_to_an_end(start: Start) -> None:
    def strict(asked: dict[str, Any]) -> Reply | dict[str, Any]:
        odd = asked.keys() - {"model", "messages"}
        return (400, named(sorted(odd)[0]), {}) if odd else FINE

    running = start(strict)
    assert generated(opened(asking(running)), "a") == ["a river"]
    assert len(running.asked) == 5  # seed, temperature, max_tokens, then max_completion_tokens

    always = start(lambda _: (400, named("seed"), {}))
    with pytest.raises(UserError, match="'seed' is not supported"):
        generated(opened(asking(always)), "a")
    assert len(always.asked) == 2


def test_a_system_message_that_is_refused_becomes_part_of_the_question(start: Start) -> None:
    def quirk(asked: dict[str, Any]) -> Reply | dict[str, Any]:
        system = asked["messages"][0]["role"] == "system"
        return (400, {"error": {"message": "System role not supported"}}, {}) if system else FINE

    running = start(quirk)
    assert generated(opened(asking(running)), "fix") == ["a river"]
    (message,) = running.asked[-1]["messages"]
    assert message == {"role": "user", "content": f"{server.CONTINUE}\n\nprefix"}


def test_the_server_s_reason_is_told_and_not_that_others_were_stopped(start: Start) -> None:
    for status in (401, 404, 429):
        running = start(lambda _, status=status: (status, {"error": {"message": "insufficient_quota of yours"}}, {}))
        for _ in range(3):
            with pytest.raises(UserError, match="of yours"):
                generated(opened(asking(running)), *"abcdefghijklmnop")
    running = start(lambda _: (400, {"error": {"message": "no such thing"}}, {}))
    with pytest.raises(RefusedError, match="no such thing"):
        generated(opened(asking(running)), *"abcdefgh")


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ({"error": {"message": "model is overloaded", "code": 502}}, r"status 502 \(model is overloaded\), 6 times"),
        ({"object": "error", "message": "overloaded"}, r"status 500 \(overloaded\), 6 times"),
        (b"", "an empty body"),
        (b"<html><title>Down for repair</title></html>", "Down for repair"),
        (b"\xff\xfe half", "half"),
        ({"choices": None, "note": "hm"}, "not OpenAI's JSON"),
        ({"choices": [[]]}, "not OpenAI's JSON"),
        ({"choices": [{"message": {"content": {"a": 1}}}]}, "not OpenAI's JSON"),
        (b"[" * 100_000, "not OpenAI's JSON"),
        (b'{"choices": ' + b"1" * 5000 + b"}", "not OpenAI's JSON"),
        ((429, {"error": {"message": "You exceeded your current quota"}}, {}), "the account has nothing left"),
        ((402, {"error": {"message": "Insufficient Balance"}}, {}), "Insufficient Balance"),
        ((301, b"", {"Location": "https://elsewhere/v1"}), "moved to https://elsewhere/v1"),
        ((403, {"error": {"message": "no access"}}, {}), r"no access.*right key in \$OPENAI_API_KEY"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_used_is_one_line_in_the_server_s_words(start: Start, reply: Any, told: str) -> None:
    running = start(lambda _: reply)
    with pytest.raises(UserError, match=told) as caught:
        generated(opened(asking(running)), "a")
    assert "\n" not in str(caught.value)
    assert len(running.asked) == (1 if isinstance(reply, tuple) else server.TRIES)


@pytest.mark.parametrize(
    "answer",
    [
        b"\xef\xbb\xbf" + json.dumps(FINE).encode(),
        b"data: " + json.dumps(FINE).encode() + b"\n\ndata: [DONE]\n\n",
        b"\n\n    " + json.dumps(FINE).encode(),
        said("<think>\nhm\n</think>\n\na river"),
        said("hm\n</think>\n\na river"),
        said("\n\n a river\nmore"),
    ],
    ids=str,
)
@pytest.mark.parametrize("chat", [True, False])
def test_odd_answers_are_read(start: Start, answer: Any, chat: bool) -> None:
    assert generated(opened(asking(start(lambda _: answer), llm_chat=chat)), "a")[0].strip() == "a river"


@pytest.mark.parametrize("header", ["20ms", "nan", "-3", "Wed, 21 Oct 2015 07:28:00 GMT", "1e99", "soon"])
def test_a_wait_asked_for_in_any_form_is_bounded(start: Start, monkeypatch: pytest.MonkeyPatch, header: str) -> None:
    monkeypatch.setattr(server, "LONGEST_WAIT", 0.05)
    replies = [(429, {"error": {"message": "slow down"}}, {"Retry-After": header})]
    running = start(lambda _: replies.pop() if replies else FINE)
    begun = time.monotonic()
    assert generated(opened(asking(running)), "a") == ["a river"]
    assert time.monotonic() - begun < 2


def test_blanks_that_keep_a_line_open_do_not_keep_it_for_ever(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TRIES", 1)

    def blanks() -> Iterator[bytes]:
        for _ in range(30):
            time.sleep(0.1)
            yield b" "

    running = start(lambda _: (200, blanks(), {"Content-Length": "1000"}))
    with pytest.raises(UserError, match="--llm-timeout"):
        generated(opened(asking(running, llm_timeout=1)), "a")


def test_useless_answers_are_not_kept_and_older_ones_not_served(start: Start) -> None:
    replies = [said(None, "length"), said("", "content_filter"), said("<think>\nhm", "length"), FINE]
    running = start(lambda _: replies[min(len(running.asked), 4) - 1])
    llm = opened(asking(running))
    found = [generated(llm, "a")[0] for _ in range(5)]
    assert [isinstance(answer, NoAnswer) for answer in found] == [True] * 3 + [False] * 2
    assert len(running.asked) == 4  # the last one was kept

    chat = {"messages": [{"role": "system", "content": server.CONTINUE}, {"role": "user", "content": "preb"}]}
    body = {"model": "m", "max_tokens": 60, "temperature": 0, "seed": 0} | chat
    cache = AnswerCache(Path(config_cache()) / "answers.sqlite3")
    request = {"url": running.url, "path": "chat/completions", "body": body}
    for old, answers in (
        ("", ["a river"]),
        ("<think>\nhm", ["a river"]),
        ("<think>hm</think>\nan old one", ["an old one"]),
    ):
        cache.store(request, old)
        assert generated(llm, "b") == answers


def test_half_a_character_is_replaced_and_said(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    llm = opened(asking(start(lambda _: said("a river \ud83d"))))
    for _ in range(2):  # from the server and from the cache
        assert generated(llm, "a") == ["a river \ufffd"]
        assert "1 answers hold half a character" in capsys.readouterr().err


def test_a_key_that_no_header_can_hold_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "clé secrète")
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY: not a key") as caught:
        opened(asking(start(lambda _: FINE)))
    assert "secr" not in str(caught.value)


def word_of(asked: dict[str, Any]) -> str:
    """The strongest word of the neuron that a request is about."""
    text = asked["messages"][-1]["content"] if "messages" in asked else asked["prompt"]
    return re.findall(r"Words: (\w+)", text)[-1]


def explaining(run: Run, running: Quirky, **changes: Any) -> ExplainConfig:
    return ExplainConfig(run.root, protocols=("top-and-random",), llm=asking(running, **changes))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_one_refused_prompt_is_a_named_skip_and_the_others_are_done(start: Start, tmp_path: Path, batch: int) -> None:
    run = make_run(tmp_path / "run", layers=(0,))

    def quirk(asked: dict[str, Any]) -> Reply | dict[str, Any]:
        return (400, FILTERED, {}) if word_of(asked) == "cat" else said(f"the word {word_of(asked)}")

    running = start(quirk)
    (folder,) = explain(explaining(run, running, llm_batch=batch))
    found = {neuron.index: item for neuron, item in read_explanations(folder).items()}
    assert {index for index, item in found.items() if item.skipped} == {1, DEAD_INDEX}
    assert found[1].skipped == f"{REFUSED}status 400 (The prompt was filtered (content_filter))"
    assert found[0].text == "the word dog"
    # Another run of the command loses nothing, and the one that was refused may be asked for again.
    asked = len(running.asked)
    explain(explaining(run, running, llm_batch=batch))
    assert len(running.asked) == asked
    drop(Explained(run, "codes", "quirky", "top").explanations, 0, [1])
    explain(explaining(run, running, llm_batch=batch))
    assert len(read_explanations(folder)) == N_NEURONS


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (said(None, "length", reasoning_content="hm"), "no answer within 60 tokens.*--llm-max-tokens"),
        (said("<think>\nhm", "length"), "--llm-max-tokens"),
        (said(""), f"{EMPTY_ANSWER}.*--llm-max-tokens"),
        (said(None, "stop", refusal="I cannot."), "refusal: I cannot.*--llm-model"),
        ((400, {"error": {"message": "no such thing"}}, {}), "no such thing"),
        ((400, FILTERED, {}), "The prompt was filtered"),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 16])
def test_when_no_answer_can_be_used_nothing_is_written(
    start: Start, tmp_path: Path, reply: Any, told: str, batch: int
) -> None:
    run = make_run(tmp_path / "run", layers=(0, 1, 2))
    running = start(lambda _: reply)
    with pytest.raises(UserError, match=told) as caught:
        explain(explaining(run, running, llm_batch=batch))
    assert "\n" not in str(caught.value)
    assert len(running.asked) <= 16 + 7  # a batch ends with its layer
    assert not (run.root / "explanations").exists()
    # What was advised can be done: the folder belongs to nothing yet.
    fine = start(lambda _: FINE)
    (folder,) = explain(explaining(run, fine, llm_max_tokens=2000))
    assert {asked["max_tokens"] for asked in fine.asked} == {2000}
    assert len(read_explanations(folder)) == 3 * N_NEURONS
    with pytest.raises(UserError, match="max_tokens = 2000, not 60"):
        explain(explaining(run, fine))


def test_a_token_limit_below_one_is_named() -> None:
    with pytest.raises(UserError, match="--llm-max-tokens 0: has to be 1 or more"):
        LLMConfig(llm_max_tokens=0)


def likeliest(asked: dict[str, Any], tokens: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """Log-probabilities at every place of a prompt, alike everywhere."""
    tops: list[Any] = [{f"token_id:{token}": -1.0 - token / 1000 for token in tokens}]
    if asked.get("echo"):
        tops = [None, *tops * len(asked["prompt"])]
    return {"choices": [{"text": "", "logprobs": {"top_logprobs": tops}}]}


@pytest.fixture
def explained(tmp_path: Path) -> Run:
    """A run with explanations of three neurons, all of which can be simulated and judged."""
    run = make_run(tmp_path / "run", layers=(0,))
    path = layer_file(run.records("codes"), 0)
    write_records(path, [silenced(record, index) for index, record in read_records(path).items()])
    explain(settings_for(run, neurons=3, protocols=("top-and-random",)), ScriptedLLM(first_word))
    return run


@pytest.mark.parametrize("stage", ["simulate", "judge"])
def test_a_window_that_is_refused_skips_its_neuron_only(
    start: Start, explained: Run, tmp_path: Path, stage: str
) -> None:
    folder = Explained(explained, "codes", "scripted", "top").explanations.folder
    texts = [item.text for item in read_explanations(folder).values() if item.text]
    assert len(texts) > 1
    tokenizer = train_bpe(iter([*["10"] * 99, "0 10 1 yes no the word dog The detector finds Text Answer Tokens"]), 350)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    digits = [tokenizer(text).input_ids[0] for text in ("0", "1", "10", " yes", " no")]
    assert len(tokenizer("10").input_ids) == 1

    def quirk(asked: dict[str, Any]) -> Reply | dict[str, Any]:
        last = tokenizer.decode(asked["prompt"]).rpartition("The detector finds: ")[2]
        return (400, FILTERED, {}) if last.startswith(texts[0]) else likeliest(asked, digits)

    def done_with(running: Quirky) -> list[Any]:
        llm = asking(running, llm_chat=False, llm_tokenizer=str(tmp_path / "tokenizer"))
        open_llm.cache_clear()
        options = {"explainer": "scripted", "protocols": ("top-and-random",), "llm": llm}
        if stage == "judge":
            return [
                item for folder in judge(JudgeConfig(explained.root, **options)) for item in read_judgements(folder)
            ]
        folders = simulate(SimulateConfig(explained.root, simulator="all-at-once", **options))
        return [item for folder in folders for item in read_simulations(folder).values()]

    with pytest.raises(UserError, match="no such thing"):
        done_with(start(lambda _: (400, {"error": {"message": "no such thing"}}, {})))
    assert not (explained.root / {"simulate": "simulations", "judge": "judgements"}[stage]).exists()
    found = done_with(start(quirk))
    refused = [item for item in found if str(item.skipped).startswith(REFUSED)]
    if stage == "judge":  # a neuron is refused for its own text, or for that of the other one it is compared with
        assert texts[0] in {item.text for item in refused}
        assert any(item.probabilities for item in found)
    else:
        assert [item.texts[OWN] for item in refused if OWN not in item.expected] == [texts[0]]
        assert [item.texts[OWN] for item in found if OWN in item.expected] == texts[1:]
        scores = score(ScoreConfig(explained.root, explainer="scripted", simulator="all-at-once", **PROTOCOL))
        assert any(REFUSED in str(item.reason) for item in read_scores(scores) if item.control == OWN)
    never = start(lambda _: (500, b"", {}))
    assert done_with(never) == found
    assert never.asked == []


@pytest.mark.parametrize(
    ("quirk", "sent"),
    [
        (lambda asked: (400, named("logprobs"), {}) if asked["logprobs"] == 20 else likeliest(asked), {"logprobs": 5}),
        (
            lambda asked: (
                likeliest(asked) if asked["logprobs"] is True else (422, named("logprobs", "a boolean: {}"), {})
            ),
            {"logprobs": True, "top_logprobs": 20},
        ),
        (refusing("max_tokens", 400, named("max_tokens")), None),
        (lambda asked: (400, named("logprobs", "no {} here"), {}), None),
        (lambda asked: (400, named("echo"), {}) if "echo" in asked else likeliest(asked), None),
    ],
    ids=["five", "boolean", "none with", "none at all", "echo"],
)
def test_log_probabilities_are_asked_for_in_the_way_a_server_takes(
    start: Start, local: tuple[LocalLLM, Path], quirk: Quirk, sent: dict[str, Any] | None
) -> None:
    running = start(quirk)
    llm = opened(asking(running, llm_chat=False, llm_tokenizer=str(local[1])))
    if sent:
        assert llm.slot_logprobs([5], [[6, 7, 8]], [[1, 3]], [1, 2])[0] == pytest.approx(
            np.array([[-1.001, -1.002]] * 2)
        )
        assert running.asked[-1].items() >= sent.items()
    else:
        with pytest.raises(UserError, match="gives no log-probabilities"):
            llm.slot_logprobs([5], [[6, 7, 8]], [[1, 3]], [1, 2])


@pytest.mark.parametrize("address", ["http://[::1", "http://127.0.0.1:99999/v1", "https://", "http://:80/v1"])
def test_an_address_that_is_none_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(UserError, match=r"http://HOST:PORT/v1"):
        server.ServerLLM.open(LLMConfig(llm=address, llm_model="m"))
    assert LLMConfig(llm="HTTP://localhost/v1").served
