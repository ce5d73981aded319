"""Logged chats on the wire."""

from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from app.api.schemas.common import Integer, Text
from app.api.schemas.influence import OptionsIn

REQUEST: dict[str, Any] = {
    "model": "smollm2-veld",
    "messages": [{"role": "user", "content": "Who founded the harbour of Veld?"}],
    "temperature": 0,
}
RESPONSE: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Ilse Marn founded the harbour in 1412."},
            "finish_reason": "stop",
        }
    ],
}
_NONE, _OBJECT = {"type": "null"}, {"type": "object"}
_WAYS: list[Any] = [
    {
        "required": ["request", "response"],
        "properties": {"request": _OBJECT, "response": _OBJECT, "logged": _NONE},
    },
    {
        "required": ["logged"],
        "properties": {"logged": {"type": ["object", "string"]}, "request": _NONE, "response": _NONE},
    },
]


class ChatCompletionIn(OptionsIn):
    """An OpenAI chat-completion request with its response, as a client or a gateway logged them."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _WAYS})

    request: dict[str, Any] | None = Field(
        None,
        description="What was sent: `messages` count (texts, or content parts of type text), the rest is passed over.",
        examples=[REQUEST],
    )
    response: dict[str, Any] | None = Field(
        None, description="What came back: the message of one of its `choices` is explained.", examples=[RESPONSE]
    )
    logged: dict[str, Any] | Text | None = Field(
        None,
        description="Instead of both: a line of a log, as an object or as it stands there, which has them under "
        "`request` and `response`; each may be in a `body`, as in logs of batches.",
        examples=[None],
    )
    choice: Integer | None = Field(
        None, ge=0, description="Which choice, from 0, where the response has several.", examples=[0]
    )
    span: tuple[Integer, Integer] | None = Field(
        None, description="Explain only these characters `[start, end)` of the answer.", examples=[[0, 9]]
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [one is not None for one in (self.request, self.response, self.logged)]
        if given not in ([True, True, False], [False, False, True]):
            raise ValueError("give `request` and `response`, or `logged`")
        return self
