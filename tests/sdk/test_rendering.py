"""Answers in a notebook: everything is escaped, and what is missing is named."""

import builtins
import re
from typing import Any

import matplotlib as mpl
import pytest

from headwater_client import errors, models, to_pandas
from headwater_client._rendering import heat_map

EVIL = "<script>alert('x')</script>"
HIT: dict[str, Any] = {
    "id": EVIL,
    "prompt": EVIL,
    "response": EVIL,
    "metadata": {EVIL: EVIL},
    "score": 1.5,
    "percentile": 99.0,
    "token_scores": [1.0, -0.5],
}
ANSWER = models.Influence.model_validate(
    {
        "index": "idx",
        "generation": EVIL + "\n$x$",
        "generated": False,
        "loss": 1.0,
        "tokens": [
            {"text": EVIL, "start": 0, "end": len(EVIL), "loss": 1.0, "in_span": True},
            {"text": "out", "start": len(EVIL), "end": len(EVIL) + 3, "loss": 1.0, "in_span": False},
            {"text": "\n$x$", "start": len(EVIL) + 3, "end": len(EVIL) + 7, "loss": 1.0, "in_span": True},
        ],
        "proponents": [HIT, {**HIT, "token_scores": [3.0, 0.5], "train_tokens": [{"text": EVIL, "score": 0.1}]}],
        "opponents": [{**HIT, "score": -0.5, "prompt": "", "response": "a $ sign\n" * 20}],
        "definition": {
            "name": "layer_cosine",
            "formula": "",
            "normalize": "unit",
            "index_normalisation": "layer",
            "projection": {},
            "checkpoints": [],
            "tokens_route": None,
        },
        "warnings": [EVIL],
        "timings": {},
    }
)


@pytest.fixture(autouse=True)
def _no_window() -> None:
    mpl.use("agg")


def test_token_means_skip_what_is_outside_the_span() -> None:
    assert ANSWER.token_means == [2.0, 0.0, 0.0]


def test_nothing_that_a_row_or_a_model_wrote_is_markup() -> None:
    html = ANSWER._repr_html_()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 15  # tokens, prompts, responses, metadata, ids, the warning


def test_colours_go_with_the_scores_and_numbers_stand_beside_them() -> None:
    spans = re.findall(r'rgba\(([\d,]+),([\d.]+)\)" title="([^"]+)">(\w+)', heat_map(["a", "b", "c"], [2.0, -1.0, 0.0]))
    assert spans == [
        ("255,140,50", "1.00", "+2", "a"),
        ("110,160,230", "0.50", "-1", "b"),
        ("110,160,230", "0.00", "+0", "c"),
    ]


def test_an_answer_becomes_a_data_frame() -> None:
    frame = ANSWER.to_pandas()
    assert list(frame["side"]) == ["proponent", "proponent", "opponent"]
    assert list(frame["rank"]) == [1, 2, 1]
    assert frame[f"metadata.{EVIL}"][0] == EVIL
    assert list(to_pandas([*ANSWER.tokens])["text"]) == [token.text for token in ANSWER.tokens]


def test_an_answer_is_drawn() -> None:
    axes = ANSWER.plot()
    assert [bar.get_width() for bar in axes.patches] == [1.5, 1.5, -0.5]
    axes.figure.canvas.draw()  # a dollar sign is no formula
    assert ANSWER.plot(axes) is axes


@pytest.mark.parametrize(("package", "draw"), [("pandas", ANSWER.to_pandas), ("matplotlib", ANSWER.plot)])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, package: str, draw: Any) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(errors.PackageMissing, match=rf"needs {package}: pip install"):
        draw()
