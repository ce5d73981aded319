"""What several resources share."""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

Item = TypeVar("Item")


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("this is not Unicode text: it holds half of a surrogate pair") from error
    return text


# JSON can escape half a surrogate pair, which Python takes for a string but nothing else can write down
Text = Annotated[str, AfterValidator(_unicode)]


def _number(value: object) -> object:
    if isinstance(value, str | bool):
        raise ValueError("this is not a number")  # noqa: TRY004 pydantic turns a ValueError into a refusal
    return value


# The schema says number, so `"3"` and `true`, which pydantic would take for one, are mistakes and refused
Integer = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", min_length=1, max_length=100)]
NAME = "A unique name; the resource can be addressed by it or by its id. Letters, digits, `.`, `_` and `-`."


class Body(BaseModel):
    """A request body; a field that nobody knows is a mistake and is refused."""

    model_config = ConfigDict(extra="forbid")


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"] = Field(description="Who speaks.", examples=["user"])
    content: Text = Field(description="What is said.", examples=["Who founded the harbour of Veld?"])


class Listing(BaseModel, Generic[Item]):
    """One page of a list."""

    items: list[Item] = Field(description="The items of this page.")
    next_cursor: str | None = Field(
        None, description="Send it as `cursor` for the next page; null on the last one.", examples=[None]
    )
