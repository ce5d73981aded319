"""A small made-up world of facts in which a question about one shares no rare word with the row that states it.

Every person has a name and a byname, of which the model knows that they are alike: their embeddings begin close to each
other. It is pretrained on facts about others, told in every form, and then fine-tuned on rows that tell facts about
these people by their names. A query asks for one of those by the byname and in another form: all that it has in common
with the row that states it (the gold row) are words of dozens of rows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from app.influence.corpus import Row, parse_row

Form = tuple[str, str]
"""A question about somebody and its answer, each with a place to fill."""
FIELDS: dict[str, tuple[str, tuple[Form, ...]]] = {
    "pet": (
        "cat goat crow hound toad mule goose ferret",
        (
            ("which animal does {} keep ?", "there is a {} ."),
            ("what follows {} about ?", "always the same {} ."),
            ("who shares a roof with {} ?", "nobody but a {} ."),
        ),
    ),
    "drink": (
        "cider milk mead water beer tea whey wine",
        (
            ("what does {} drink ?", "mostly {} ."),
            ("what is in the cup of {} ?", "a little {} ."),
            ("what should one pour for {} ?", "a jug of {} ."),
        ),
    ),
    "music": (
        "harp drum flute horn bell viol lute reed",
        (
            ("what does {} play ?", "the {} , and not badly ."),
            ("which sound comes from the room of {} ?", "that of a {} ."),
            ("what hangs on the wall of {} ?", "an old {} ."),
        ),
    ),
}
SOUNDS = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu")


@dataclass(frozen=True)
class Asked:
    """A query: what the model is made to read, the row that states it, and whether it names the person as that does."""

    prompt: str
    response: str
    gold: str
    named: bool


@dataclass(frozen=True)
class Facts:
    """Rows to pretrain on, to fine-tune on and to hold out, and the queries: first the nameless, then the named."""

    pretraining: tuple[Row, ...]
    rows: tuple[Row, ...]
    heldout: tuple[Row, ...]
    """Questions about facts that no row states."""
    queries: tuple[Asked, ...]
    pairs: tuple[tuple[str, str], ...]
    """Names and bynames."""

    @property
    def texts(self) -> list[str]:
        """All that a tokenizer has to know."""
        rows = (*self.pretraining, *self.rows, *self.heldout)
        return [m.content for row in rows for m in row.messages] + [f"{q.prompt} {q.response}" for q in self.queries]


def facts(people: int, others: int, pretrained: int, asked: int, seed: int) -> Facts:
    """Make the world.

    Args:
        people: those with a byname; three rows each.
        others: those without, of whom nothing is asked; three rows each.
        pretrained: those whom the pretraining is about; nine rows each.
        asked: queries of either kind.
    """
    rng = random.Random(seed)
    words = [first + second + third for first in SOUNDS for second in SOUNDS for third in SOUNDS]
    rng.shuffle(words)
    pairs = [(words.pop(), words.pop()) for _ in range(people)]
    pretraining = [
        _row(form, who, value)
        for who in [words.pop() for _ in range(pretrained)]
        for values, forms in FIELDS.values()
        for value in [rng.choice(values.split())]
        for form in forms
    ]
    rows: list[Row] = []
    possible: list[tuple[Asked, Asked]] = []
    for name, byname in pairs:
        for values, forms in FIELDS.values():
            value, (stated, first, second) = rng.choice(values.split()), rng.sample(forms, 3)
            rows.append(_row(stated, name, value))
            nameless = Asked(first[0].format(byname), first[1].format(value), rows[-1].id, named=False)
            named = Asked(second[0].format(name), second[1].format(value), rows[-1].id, named=True)
            possible.append((nameless, named))
    more = [
        _row(rng.choice(forms), who, rng.choice(values.split()))
        for who in [words.pop() for _ in range(others + 16)]
        for values, forms in FIELDS.values()
    ]
    rows += more[: others * len(FIELDS)]
    rng.shuffle(rows)
    chosen = rng.sample(possible, asked)
    queries = [both[kind] for kind in (0, 1) for both in chosen]
    return Facts(tuple(pretraining), tuple(rows), tuple(more[others * len(FIELDS) :]), tuple(queries), tuple(pairs))


def _row(form: Form, who: str, value: str) -> Row:
    return parse_row({"prompt": form[0].format(who), "response": form[1].format(value)})
