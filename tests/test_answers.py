"""What is read out of answers: text without reasoning, errors in any shape, the option an error is about."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cratescope.explain.phrase import clean_answer
from cratescope.llm.answers import (
    EMPTY_ANSWER,
    ONLY_REASONING,
    SYSTEM,
    error_status,
    parsed,
    refused_option,
    text_of,
    words,
)
from cratescope.llm.interface import NoAnswer
from cratescope.llm.reasoning import phrase, without_reasoning
from cratescope.llm.server import _retry_after

ANSWER = "words such as river"
SENT = {
    **{"model": "m", "prompt": "", "max_tokens": 60, "temperature": 0, "seed": 0, "stop": ["\n"]},
    **{"logprobs": 20, "echo": True},
}
CHAT = SENT | {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": ""}]}


@pytest.mark.parametrize(
    "text",
    [
        f"<think>\nA river. Let me see.\n</think>\n\n{ANSWER}",
        f"A river. Let me see.\n</think>\n\n{ANSWER}",
        f'<think>I write "{ANSWER}"</think>{ANSWER}',
        f"<think></think>\n{ANSWER}",
        f"<think>a</think><think>b</think>{ANSWER}<think>c",
        f"<thinking>hm</thinking>\n<answer>{ANSWER}</answer>",
        f"<reasoning>hm\n\nhm</reasoning> {ANSWER}",
        f"<thought>hm</thought>{ANSWER}",
        f'<details type="reasoning" done="true">\nhm\n</details>\n{ANSWER}',
        f"<seed:think>hm</seed:think>{ANSWER}",
        f"[THINK]hm[/THINK]{ANSWER}",
        f"◁think▷hm◁/think▷{ANSWER}",
        f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}<|return|>",
        f"analysisWe need a phrase.assistantfinal{ANSWER}",
        f"<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>{ANSWER}<|END_RESPONSE|>",
        f"<|channel>thought\nhm<channel|>{ANSWER}<turn|>",
        f"<unused94>thought\nhm<unused95>{ANSWER}",
        f"Here is my thought process:\nhm\nHere is my response:\n{ANSWER}",
        f"{ANSWER}<think>\nWas that right?\n</think>",
        f"{ANSWER}\n<think>\nWas that",
        f"{ANSWER}<|im_end|>",
        f"{ANSWER}</s>",
        f"\n\n{ANSWER}\n\nWords: other",
        f"Sure! Here is the continuation:\n\n{ANSWER}",
        f"```text\n{ANSWER}\n```",
        f"Words: river, boat\n{ANSWER}",
        f"**Answer:**\n{ANSWER}",
    ],
)
def test_reasoning_and_announcements_are_dropped(text: str) -> None:
    assert phrase(text, "\n").strip() == ANSWER


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nLet me look at the words",
        "\n<thinking> hm",
        "<|channel|>analysis<|message|>We need",
        "analysisWe need to",
        "[THINK]hm",
        "hm\n</think>\n",
        "<think>hm</think>",
        "Here's my thinking process:\n</think>",
    ],
)
def test_reasoning_that_does_not_end_is_no_answer(text: str) -> None:
    assert without_reasoning(text).strip() == ""
    found = text_of(True, 60)({"choices": [{"message": {"content": text}, "finish_reason": "length"}]})
    assert isinstance(found, NoAnswer)
    assert found.reason == "no answer within 60 tokens, which reasoning spent (finish_reason length)"
    found = text_of(True, 60)({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
    assert isinstance(found, NoAnswer)
    assert found.reason == ONLY_REASONING


@pytest.mark.parametrize(
    "text",
    [
        'the tag "</think>"',
        'tags such as "<think>" and "<b>"',
        "tags such as <think> and <b>",
        "the token <|endoftext|>",
        "closing tags such as </details>",
        "analysis and other words of science",
        "explanation markers, such as because.\nmore",
        "the word answer",
    ],
)
def test_marks_that_are_spoken_of_stay(text: str) -> None:
    assert phrase(text, "\n") == text.split("\n")[0]


def message(**fields: Any) -> dict[str, Any]:
    finish = fields.pop("finish", None)
    return {"choices": [{"message": fields, "finish_reason": finish}]}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (message(content=None, reasoning_content="hm", finish="length"), "which reasoning spent"),
        (message(content="", reasoning="hm", finish="max_tokens"), "finish_reason max_tokens"),
        (message(content="", finish="length"), "no answer within 60 tokens (finish_reason length)"),
        (message(content="wor", finish="content_filter"), "content filter (finish_reason content_filter)"),
        (message(content="", finish="SAFETY"), "content filter (finish_reason SAFETY)"),
        (message(content=None, refusal="I cannot help with that."), "refusal: I cannot help with that."),
        (message(content=[{"type": "refusal", "refusal": "No."}]), "refusal: No."),
        (message(content="I'm sorry, but I can't assist with that."), "refusal: I'm sorry, but I can't assist"),
        (message(content="", finish="stop"), EMPTY_ANSWER),
        (message(content=None, finish="tool_calls"), "empty answer (finish_reason tool_calls)"),
        (message(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]), EMPTY_ANSWER),
    ],
)
def test_why_there_is_no_answer_is_named(answer: dict[str, Any], reason: str) -> None:
    found = text_of(True, 60)(answer)
    assert isinstance(found, NoAnswer)
    assert reason in found.reason
    assert found.fix


@pytest.mark.parametrize(
    "answer",
    [
        message(content=ANSWER, reasoning_content="hm", finish="length"),
        message(content=[{"type": "thinking", "thinking": []}, {"type": "text", "text": ANSWER}]),
        message(content=["words such ", {"type": "output_text", "text": "as river"}]),
        message(content={"text": {"value": ANSWER}}),
        message(content=ANSWER, refusal=None),
        {"choices": [{"text": ANSWER}]},
    ],
)
def test_a_text_is_found_in_any_shape(answer: dict[str, Any]) -> None:
    assert text_of(True, 60)(answer) == ANSWER


@pytest.mark.parametrize(
    "answer", [{"choices": [{}]}, {"choices": [{"message": {"content": 7}}]}, {"choices": None}, [], 3]
)
def test_what_is_no_answer_is_not_read_as_one(answer: Any) -> None:
    with pytest.raises((LookupError, TypeError, AttributeError)):
        text_of(True, 60)(answer)


def test_an_answer_is_read_behind_a_mark_and_as_events() -> None:
    whole = {"choices": [{"text": ANSWER}]}
    assert parsed("\ufeff" + json.dumps(whole)) == parsed("\n\n   " + json.dumps(whole)) == whole
    assert parsed(f": keep-alive\n\ndata: {json.dumps(whole)}\n\ndata: [DONE]\n\n") == whole
    pieces = [{"choices": [{"delta": {"content": piece}}]} for piece in ("words such ", "as river", None)]
    pieces += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": {}}]
    events = "".join(f"event: x\r\ndata: {json.dumps(piece)}\r\n\r\n" for piece in pieces)
    assert text_of(True, 60)(parsed(events)) == ANSWER
    assert error_status(parsed('data: {"error": {"message": "overloaded", "code": 529}}')) == 529


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "no", "code": "bad_thing"}}, "no (bad_thing)"),
        ({"error": "no"}, "no"),
        ({"object": "error", "message": "no", "type": "BadRequestError", "code": 400}, "no"),
        ({"detail": [{"loc": ["body", "seed"], "msg": "no", "input": {"stop": 1}}]}, "seed: no"),
        ({"detail": "no"}, "no"),
        ({"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}, "no"),
        ({"errors": [{"message": "no"}, {"message": "never"}]}, "no; never"),
        ({"error": {"message": "Provider returned error", "metadata": {"raw": '{"error": {"message": "no"}}'}}},
         "Provider returned error; no"),
        ("plain  words\n", "plain words"),
        ("<!DOCTYPE html><html><head><style>b {}</style><title>502 Bad Gateway</title></head>\n<body></body>",
         "502 Bad Gateway"),
        ("half \ud83d", "half \ufffd"),
        ("[" * 100_000, "[" * 200),
    ],
)  # fmt: skip
def test_a_server_is_quoted_in_its_own_words(body: Any, said: str) -> None:
    assert words(body if isinstance(body, str) else json.dumps(body)) == said


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"error": {"message": "overloaded", "code": 502}}, 502),
        ({"error": {"message": "no", "code": "400"}}, 400),
        ({"error": {"message": "no", "type": "invalid_request_error"}}, 400),
        ({"error": "no"}, 500),
        ({"choices": [], "error": {"message": "no", "code": "insufficient_quota"}}, 429),
        ({"choices": [{"error": {"code": 403, "message": "flagged"}, "message": {"content": ""}}]}, 403),
        ({"object": "error", "message": "no", "code": 404}, 404),
        ({"detail": "no"}, 500),
        ({"choices": [{"text": ""}], "error": None, "message": "fine"}, None),
        ({"choices": []}, None),
        ([], None),
    ],
)
def test_an_error_in_a_200_has_the_status_it_tells_of(answer: Any, status: int | None) -> None:
    assert error_status(answer) == status


def pydantic(*names: str) -> dict[str, Any]:
    return {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted",
                        "input": CHAT} for name in names]}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "option"),
    [
        ({"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                    "'max_completion_tokens' instead.", "param": "max_tokens"}}, "max_tokens"),
        ({"error": {"message": "Unsupported value: 'temperature' does not support 0.", "param": "temperature"}},
         "temperature"),
        ({"object": "error", "message": pydantic("seed"), "type": "invalid_request_error"}, "seed"),
        (pydantic("stop", "seed"), "stop"),
        ({"object": "error", "message": str(pydantic("seed")["detail"])}, "seed"),
        ({"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required", "input": SENT}]}, None),
        ({"error": 'json: unknown field "seed"'}, "seed"),
        ({"error": {"code": 400, "message": "Unsupported param: echo"}}, "echo"),
        ({"error": {"message": "Unrecognized request argument supplied: seed", "param": None}}, "seed"),
        ({"error": {"message": "Invalid JSON payload received. Unknown name \"seed\": Cannot find field."}}, "seed"),
        ({"type": "error", "error": {"message": "temperature: Extra inputs are not permitted"}}, "temperature"),
        ({"error": "Input validation error: `temperature` must be strictly positive"}, "temperature"),
        ({"error": {"message": "Provider returned error", "metadata": {
            "raw": json.dumps({"error": {"message": "Unsupported parameter: 'stop'"}})}}}, "stop"),
        ("seed is not supported", "seed"),
        ("what is logprobs?", "logprobs"),
        ({"error": {"message": "System role not supported"}}, SYSTEM),
        ({"error": {"message": "'messages[0].role' does not support 'system' with this model",
                    "param": "messages[0].role"}}, SYSTEM),
        ({"error": {"message": "Please stop. The prompt was filtered", "param": "prompt"}}, None),
        ({"error": {"message": "'max_tokens' is too large: 60. The maximum context length is 64 tokens"}}, None),
        ({"error": {"message": "no such option"}}, None),
        ({"error": {"message": "The model `temperature-1` does not exist"}}, None),
    ],
)  # fmt: skip
def test_the_option_an_error_is_about_is_found_in_any_shape(body: Any, option: str | None) -> None:
    assert refused_option(body if isinstance(body, str) else json.dumps(body), CHAT) == option


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("0.7", 0.7), ("20ms", 0.02), ("1m30s", 90), ("6m0s", 300), ("1e9", 300), ("99999999999", 300), ("0", 0),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 21 Oct 9999 07:28:00 GMT", 300), ("nan", None), ("inf", None),
     ("-5", None), ("soon", None), ("", None), (None, None), ("1.2.3", None), ("Wed, 99 Oct 2015", None)],
)  # fmt: skip
def test_retry_after_is_bounded_whatever_it_holds(header: str | None, seconds: float | None) -> None:
    assert _retry_after(header) == seconds


def test_reasoning_under_a_heading_is_left_out() -> None:
    assert without_reasoning("**Reasoning:** they\nare things.\n\n**Final answer:** words").strip() == "words"
    assert without_reasoning("Analysis: words of laboratories") == "Analysis: words of laboratories"


def test_an_answer_behind_comments_of_a_stream_is_read() -> None:
    assert parsed(': PROCESSING\n\n: PROCESSING\n{"choices": []}') == {"choices": []}


def test_what_steers_a_terminal_is_no_part_of_an_explanation_or_a_message() -> None:
    assert clean_answer(" words\x1b[31m of\x00 rivers\u202e") == "words [31m of  rivers"
    assert clean_answer("\u200b") == ""
    assert words("bad \x1b]0;name\x07") == "bad ]0;name"
