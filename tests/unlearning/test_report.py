"""Intervals by their known values; the page is whole, harmless and asks nothing of anybody."""

import base64
import hashlib
import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from app.unlearning.intervals import auc, mean, share
from app.unlearning.plots import Bar, bars, lines
from app.unlearning.report import relearning, report_of
from app.unlearning.report_page import POLICY, page


def numbers(start: float, **more: list[float]) -> dict[str, list[float]]:
    loss = [start + 0.1 * n for n in range(6)]
    return {"loss": loss, "accuracy": [0.5] * 6, "written": [0.0] * 6, "probability": [0.25] * 6, **more}


def kept() -> dict[str, Any]:
    groups = ("forget", "retain", "heldout", "seen", "unseen")
    attack = {"before": [0.5, 0.4], "after": [2.5, 1.0]}
    curves = {
        name: [{"step": n, "loss": loss, "success": None} for n, loss in enumerate(each)]
        for name, each in attack.items()
    }
    return {
        "influence": {"used": False},
        "before": {"before": {group: numbers(1.0) for group in groups}},
        "training": {"steps": 3, "total": 9, "stopped": "<b>bad</b>", "curve": [[1, 1.0, 2.0], [2, None, None]]},
        "after": {"after": {group: numbers(2.0, drift=[0.1] * 6) for group in groups}},
        "relearning": {"rows": 2, "lr": 0.1, "curves": curves},
    }


@pytest.fixture
def told() -> dict[str, Any]:
    settings = {"training": {"method": "rapidun"}, "oracle": "</pre><script>alert(1)</script>"}
    rows = {"forget": 6, "retain": 6}
    return json.loads(json.dumps(report_of(settings, rows, kept(), {"training": 1.23456})))  # type: ignore[no-any-return]


def test_a_mean_has_the_interval_of_its_rows_and_the_same_one_each_time() -> None:
    found = mean([0.0, 1.0] * 50)
    assert found == mean([0.0, 1.0] * 50)
    assert found is not None
    assert (found.value, found.rows) == (0.5, 100)
    assert found.low == pytest.approx(0.4, abs=0.03)
    assert found.high == pytest.approx(0.6, abs=0.03)
    assert mean([]) is None


def test_a_share_of_none_is_not_certain() -> None:
    found = share([0.0] * 10)
    assert found is not None
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(0.2775, abs=1e-3)  # Wilson's, from the tables


def test_membership_is_the_chance_that_a_member_has_the_lower_loss() -> None:
    apart, mixed = auc([1.0, 2.0], [3.0, 4.0]), auc([1.0, 2.0], [1.0, 2.0])
    assert apart is not None
    assert mixed is not None
    assert (apart.value, mixed.value) == (1.0, 0.5)
    assert auc([1.0], []) is None


def test_the_report_compares_row_by_row(told: dict[str, Any]) -> None:
    change = told["measures"]["retain_loss"]["change"]
    assert (change["value"], change["low"], change["high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert told["measures"]["drift"]["after"]["value"] == pytest.approx(0.1)
    assert told["measures"]["retain_perplexity"]["before"]["value"] == pytest.approx(2.718281828**1.25)
    assert "oracle" not in told["measures"]["drift"]
    assert {*told["measures"]} | {"relearning"} == {*told["definitions"]}


def test_relearning_says_how_much_came_back_and_when(told: dict[str, Any]) -> None:
    assert told["relearning"]["way_back"] == pytest.approx(0.75)
    assert told["relearning"]["half_way_step"] == 1
    curve = [{"step": 0, "loss": 1.0, "success": None}]
    flat = relearning({"rows": 1, "lr": 0.1, "curves": {"before": curve, "after": curve}})
    assert (flat["way_back"], flat["half_way_step"]) == (None, None)


def test_the_page_works_under_the_strictest_policy(told: dict[str, Any]) -> None:
    html = page(told)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" == POLICY
    assert not re.search(r"<script|\bstyle=|\bon\w+=|https?://|url\(|@import", html)
    assert "&lt;b&gt;bad" in html
    assert "prefers-color-scheme:dark" in style


def test_its_plots_are_well_formed_and_inside_their_frames(told: dict[str, Any]) -> None:
    plots = re.findall(r"<svg.*?</svg>", page(told), re.DOTALL)
    assert len(plots) == 4
    for plot in plots:
        root = ElementTree.fromstring(plot)
        assert len(root) > 5
        for rect in root.iter("rect"):
            x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            assert min(x, y, width, height) >= 0
            assert x + width <= 620
            assert y + height <= 240


def test_plots_of_one_value_or_of_equal_ones_are_drawn() -> None:
    assert "polyline" in lines("flat", {"after": [(0.0, 0.0), (1.0, 0.0)]})
    assert "polyline" in lines("one", {"after": [(3.0, 2.5)]})
    assert "rect" in bars("none", {"a": [Bar("after", 0.0, 0.0, 0.0)]})
    assert lines("nothing", {}) == bars("nothing", {}) == ""
