"""Logged chats: an OpenAI chat-completion request and its response, as they are, become a query.

What cannot be attributed is refused and named: tool calls (their text is made by a template that is not known here),
parts that are no text, several choices of which none is chosen, an answer that was streamed. What may make a
difference is a warning of the answer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from app.api.schemas.chats import ChatCompletionIn
from app.api.schemas.common import Message
from app.problems import Refusal

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""What the roles are called here."""
TEXTS = ("text", "output_text", "input_text")
CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Chat:
    """What was said before, what was answered, and what to keep in mind."""

    messages: list[Message]
    generation: str
    warnings: list[str]


def read(body: ChatCompletionIn) -> Chat:
    """The chat of a request.

    Raises:
        Refusal: 422 `bad-chat`, with the path of what cannot be attributed.
    """
    request, response = _both(body)
    before = "" if body.logged is None else "logged."
    request, at_request = _unwrapped(request, f"{before}request")
    response, at_response = _unwrapped(response, f"{before}response")
    messages = [
        _message(message, f"{at_request}.messages.{place}")
        for place, message in enumerate(_list(request, "messages", at_request, "the request of a chat completion"))
    ]
    said, at = _choice(response, at_response, body.choice)
    return Chat(messages, _generation(said, at), _warnings(request, said))


def _both(body: ChatCompletionIn) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    if body.logged is None:
        return body.request or {}, body.response or {}  # the schema wants both, without `logged`
    line: Any = body.logged
    if isinstance(line, str):
        try:
            line = json.loads(line)
        except (ValueError, RecursionError) as error:
            _refuse("logged", f"the logged line is not JSON: {error}")
    if not isinstance(line, Mapping):
        _refuse("logged", "a logged line is a JSON object")
    for name in ("request", "response"):
        if not isinstance(line.get(name), Mapping):
            _refuse(f"logged.{name}", "a logged line has the request under `request` and the response under `response`")
    return line["request"], line["response"]


def _unwrapped(part: Mapping[str, Any], at: str) -> tuple[Mapping[str, Any], str]:
    """Logs of batches keep either in a `body`, beside a status or a URL."""
    inner = part.get("body")
    return (inner, f"{at}.body") if isinstance(inner, Mapping) else (part, at)


def _list(part: Mapping[str, Any], name: str, at: str, what: str) -> Sequence[Any]:
    found = part.get(name)
    if not isinstance(found, list) or not found:
        _refuse(f"{at}.{name}", f"{what} has a list of {name}; this has none")
    return found


def _choice(response: Mapping[str, Any], at: str, chosen: int | None) -> tuple[Mapping[str, Any], str]:
    if response.get("object") == "chat.completion.chunk":
        _refuse(at, "this is a part of a streamed answer: send the whole, as it is without `stream`")
    choices = _list(response, "choices", at, "the response of a chat completion")
    if chosen is None and len(choices) > 1:
        _refuse("choice", f"the response has {len(choices)} choices: say which with `choice`, counted from 0")
    place = chosen or 0
    if place >= len(choices):
        _refuse("choice", f"the response has {len(choices)} choices, counted from 0")
    choice = choices[place]
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(message, Mapping):
        _refuse(f"{at}.choices.{place}", "a choice has a `message`; this has none")
    return message, f"{at}.choices.{place}.message"


def _generation(message: Mapping[str, Any], at: str) -> str:
    _refuse_calls(message, at)
    content = message.get("content")
    text = "" if content is None else _content(content, f"{at}.content")
    if not text.strip():
        _refuse(f"{at}.content", "the choice has no text: there is nothing to attribute")
    return text


def _message(message: Any, at: str) -> Message:
    if not isinstance(message, Mapping):
        _refuse(at, "a message is an object of `role` and `content`")
    _refuse_calls(message, at)
    role = ROLES.get(str(message.get("role")))
    if role is None:
        _refuse(f"{at}.role", f"the role is one of {', '.join(ROLES)}")
    return Message.model_validate({"role": role, "content": _content(message.get("content"), f"{at}.content")})


def _refuse_calls(message: Mapping[str, Any], at: str) -> None:
    for name in CALLS:
        if message.get(name):
            _refuse(f"{at}.{name}", "a tool call cannot be attributed: what the model wrote for it is not in the log")


def _content(content: Any, at: str) -> str:
    """A text, or the texts of its parts, a line each."""
    if isinstance(content, str):
        parts = [content]
    elif isinstance(content, list):
        parts = [_part(part, f"{at}.{place}") for place, part in enumerate(content)]
    else:
        _refuse(at, "a content is a text or a list of parts of type text")
    text = "\n".join(parts)
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(at, "this is not Unicode text: it holds half of a surrogate pair")
    return text


def _part(part: Any, at: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in TEXTS or not isinstance(text, str):
        _refuse(at, "only parts of type text can be attributed")
    return text


def _warnings(request: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    found = []
    if request.get("tools") or request.get("functions"):
        found.append("the request offers tools; what the chat template says of them is not in the prompt here")
    if said.get("reasoning_content") or said.get("reasoning"):
        found.append("the response has reasoning beside its content; the content alone is explained, without it")
    return found


def _refuse(field: str, detail: str) -> NoReturn:
    raise Refusal(422, "bad-chat", detail, field=field)
