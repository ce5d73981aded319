"""Logged chats: an OpenAI request and its response as they are."""

import copy
import json
from typing import Any

import pytest

from app.api.schemas.chats import REQUEST, RESPONSE
from tests.api.harness import Api, must, problem

SAID = RESPONSE["choices"][0]["message"]["content"]
ADDRESS = "/influence/chat-completion"


def chat(**more: Any) -> dict[str, Any]:
    """A body to change."""
    return {"index": "idx", **copy.deepcopy({"request": REQUEST, "response": RESPONSE}), **more}


def with_answer(**message: Any) -> dict[str, Any]:
    body = chat()
    body["response"]["choices"][0]["message"] |= message
    return body


def with_messages(*messages: Any) -> dict[str, Any]:
    body = chat()
    body["request"]["messages"] = list(messages)
    return body


def scores(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(hit["id"], pytest.approx(hit["score"])) for hit in answer["proponents"]]


def test_a_logged_chat_is_asked_as_its_messages_and_its_answer(asked: Api) -> None:
    plain = must(asked.post("/influence", json={"index": "idx", "messages": REQUEST["messages"], "generation": SAID}))
    found = must(asked.post(ADDRESS, json=chat()))
    assert found["generation"] == SAID
    assert not found["generated"]
    assert scores(found) == scores(plain)


@pytest.mark.parametrize(
    "logged",
    [
        {"request": REQUEST, "response": RESPONSE},
        json.dumps({"request": REQUEST, "response": RESPONSE, "latency_ms": 12}) + "\n",
        {
            "custom_id": "1",
            "request": {"url": "/v1", "body": REQUEST},
            "response": {"status_code": 200, "body": RESPONSE},
        },
    ],
    ids=["an object", "a line", "of a batch"],
)
def test_a_line_of_a_log_is_the_same(asked: Api, logged: Any) -> None:
    found = must(asked.post(ADDRESS, json={"index": "idx", "logged": logged}))
    assert scores(found) == scores(must(asked.post(ADDRESS, json=chat())))


def test_parts_of_type_text_and_developers_are_read(asked: Api) -> None:
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "the mill?"}]
    body = with_messages({"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts})
    same = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is\nthe mill?"}]
    plain = must(asked.post("/influence", json={"index": "idx", "messages": same, "generation": SAID}))
    assert scores(must(asked.post(ADDRESS, json=body))) == scores(plain)


def test_choice_selects(asked: Api) -> None:
    body = chat(choice=1)
    other = {"index": 1, "message": {"role": "assistant", "content": "Nobody knows."}}
    body["response"]["choices"].append(other)
    assert must(asked.post(ADDRESS, json=body))["generation"] == "Nobody knows."
    problem(asked.post(ADDRESS, json={**body, "choice": None}), 422, "bad-chat", "choice")
    problem(asked.post(ADDRESS, json={**body, "choice": 2}), 422, "bad-chat", "choice")


def test_options_and_a_span_are_those_of_influence(asked: Api) -> None:
    found = must(asked.post(ADDRESS, json=chat(top_k=2, tokens="none", span=[0, 4])))
    assert len(found["proponents"]) <= 2
    assert {token["in_span"] for token in found["tokens"] if token["start"] >= 4} == {False}


def test_what_may_make_a_difference_is_said(asked: Api) -> None:
    body = with_answer(reasoning_content="Who was it?")
    body["request"]["tools"] = [{"type": "function", "function": {"name": "look"}}]
    told = " ".join(must(asked.post(ADDRESS, json=body))["warnings"])
    assert "tools" in told
    assert "reasoning" in told


CALL = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:"}}]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (with_answer(content=None, tool_calls=CALL), "response.choices.0.message.tool_calls"),
        (with_answer(function_call={"name": "look"}), "response.choices.0.message.function_call"),
        (with_answer(content=None), "response.choices.0.message.content"),
        (with_answer(content=" \n"), "response.choices.0.message.content"),
        (with_answer(content=7), "response.choices.0.message.content"),
        (with_answer(content="\ud800"), "response.choices.0.message.content"),
        (with_messages(), "request.messages"),
        (with_messages("hello"), "request.messages.0"),
        (with_messages({"role": "narrator", "content": "x"}), "request.messages.0.role"),
        (with_messages({"role": "user", "content": IMAGE}), "request.messages.0.content.0"),
        (with_messages({"role": "assistant", "tool_calls": CALL}), "request.messages.0.tool_calls"),
        (chat(request={"prompt": "once"}), "request.messages"),
        (chat(response={"choices": []}), "response.choices"),
        (chat(response={"choices": [{"text": "once"}]}), "response.choices.0"),
        (chat(response={"object": "chat.completion.chunk", "choices": [{"delta": {}}]}), "response"),
        ({"index": "idx", "logged": "{"}, "logged"),
        ({"index": "idx", "logged": "7"}, "logged"),
        ({"index": "idx", "logged": {"request": REQUEST}}, "logged.response"),
        ({"index": "idx", "logged": {"request": {"body": {}}, "response": RESPONSE}}, "logged.request.body.messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_attributed_is_named(asked: Api, body: dict[str, Any], field: str) -> None:
    said = json.dumps(body)  # which can write half a surrogate pair
    headers = {"Content-Type": "application/json"}
    problem(asked.post(ADDRESS, content=said, headers=headers), 422, "bad-chat", field)


@pytest.mark.parametrize(
    "body", [{"index": "idx"}, {"index": "idx", "request": REQUEST}, chat(logged={"request": {}, "response": {}})]
)
def test_it_is_one_way_or_the_other(asked: Api, body: dict[str, Any]) -> None:
    problem(asked.post(ADDRESS, json=body), 422, "invalid-request")
