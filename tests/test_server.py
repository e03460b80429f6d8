"""The server engine against a real server on this machine that misbehaves as it is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cratescope.config import LLMConfig
from cratescope.lm.tokenizer import train_bpe
from cratescope.neurons.llm import LanguageModel, llm_identity, open_llm, server
from cratescope.neurons.llm.cache import AnswerCache
from cratescope.neurons.llm.local import LocalLLM
from cratescope.run import UserError

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
    from cratescope.lm.offline import cache

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
    assert llm_identity(config, None) == llm_identity(config, opened(config)) == {"llm": "tiny", "dtype": "served"}


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
    with pytest.raises(UserError, match="no log-probability"):
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
from cratescope.neurons.llm.cache import AnswerCache
cache = AnswerCache(pathlib.Path({str(path)!r}))
cache.store({{"prompt": 1}}, "kept")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert json.dumps(AnswerCache(path).find([{"prompt": 1}])) == '["kept"]'
