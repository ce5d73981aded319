"""From a bad answer to the rows behind it, by mouse and by keyboard, and by an address that somebody sent."""

import json
import re
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Locator, Page, Request, Route, expect

from tests.api.harness import Api, must
from tests.ui.conftest import BAD, HOSTILE, Look, ask


def asked(page: Page) -> list[dict[str, Any]]:
    """The bodies of the questions that the page sends from now on."""
    bodies: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.method == "POST" and request.url.endswith("/influence"):
            bodies.append(request.post_data_json)

    page.on("request", note)
    return bodies


def ids(page: Page) -> list[str]:
    """The rows that are shown, in their order."""
    return [row.get_attribute("data-id") or "" for row in page.locator(".row").all()]


def tokens(page: Page) -> Locator:
    """The tokens of the answer."""
    return page.get_by_role("listbox", name="The answer, token by token").get_by_role("option")


def drag(page: Page, first: int, last: int) -> None:
    """Draw over tokens with the mouse."""
    ends = [tokens(page).nth(at).bounding_box() for at in (first, last)]
    (x, y), (to_x, to_y) = ((box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in ends if box)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(to_x, to_y, steps=5)
    page.mouse.up()


def test_a_bad_answer_leads_to_the_rows_behind_it(look: Look, service: Api) -> None:
    page = look()
    ask(page)
    answer = must(service.post("/influence", json={"index": "idx", **BAD}))
    assert ids(page) == [hit["id"] for hit in answer["proponents"]]
    first = page.locator(".row").first
    expect(first).to_contain_text("The harbour number 0 is red.")
    expect(first).to_contain_text("family harbour")
    expect(first.locator(".score")).to_contain_text(f"+{answer['proponents'][0]['score']:.3f}")
    expect(first).to_contain_text(f"above {answer['proponents'][0]['percentile']:.1f} % of rows")
    assert tokens(page).count() == len(answer["tokens"])
    assert page.locator(".token.hot").count() > 0
    strongest = max(answer["proponents"][0]["token_scores"], key=abs)
    expect(page.locator(".readout")).to_contain_text(f"{abs(strongest):.3f}")
    expect(page.get_by_text("A score estimates how much training on a row")).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text("rows found")
    for warning in answer["warnings"]:
        expect(page.get_by_text(warning)).to_be_visible()


def test_the_heat_map_has_the_selected_rows_scores_or_the_losses(look: Look, service: Api) -> None:
    page = look()
    ask(page)
    answer = must(service.post("/influence", json={"index": "idx", **BAD}))
    second = answer["proponents"][1]
    page.locator(".row").nth(1).get_by_role("button", name="Show in the answer").click()
    told = tokens(page).nth(4).get_attribute("aria-label") or ""
    assert f"{abs(second['token_scores'][4]):.3f}" in told
    page.get_by_label("Coloured by").select_option(label="surprise (loss)")
    told = tokens(page).nth(4).get_attribute("aria-label") or ""
    assert told.endswith(f"surprise {answer['tokens'][4]['loss']:.3f}")
    assert "score" not in told


def test_drawing_over_words_asks_about_them_alone(look: Look, service: Api) -> None:
    page = look()
    ask(page)
    start = BAD["generation"].index("red")
    whole = must(service.post("/influence", json={"index": "idx", **BAD}))["tokens"]
    first, last = (
        next(n for n, one in enumerate(whole) if one["start"] <= at < one["end"]) for at in (start, start + 2)
    )
    bodies = asked(page)
    drag(page, first, last)
    expect(page.get_by_role("heading", name="Why “red”?")).to_be_visible()
    assert bodies[-1]["span"] == [start, start + 3]
    alone = must(service.post("/influence", json={"index": "idx", **BAD, "span": [start, start + 3]}))
    assert ids(page) == [hit["id"] for hit in alone["proponents"]]
    assert page.locator(".token[aria-selected=true]").count() == last - first + 1
    assert page.locator(".token.outside").count() == len(whole) - (last - first + 1)
    page.get_by_role("button", name="Whole answer again").click()
    expect(page.get_by_role("heading", name="Rows behind the answer")).to_be_visible()
    assert "span" not in bodies[-1]


def test_a_span_counts_characters_and_not_their_halves(look: Look) -> None:
    page = look()
    text = "🌊🌊 is red."
    ask(page, "Wave?", text)
    bodies = asked(page)
    options = tokens(page)
    labels = [options.nth(n).get_attribute("aria-label") or "" for n in range(options.count())]
    r = next(n for n, label in enumerate(labels) if label.startswith("r:"))
    drag(page, r, r + 2)
    expect(page.get_by_role("heading", name="Why “red”?")).to_be_visible()
    assert bodies[-1]["span"] == [6, 9]


def test_it_works_by_keyboard_alone(look: Look) -> None:
    page = look()
    expect(page.get_by_label("Index")).to_be_visible()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "prompt":
            break
    page.keyboard.type(BAD["prompt"])
    page.keyboard.press("Tab")
    page.keyboard.type(BAD["generation"])
    page.keyboard.press("Control+Enter")
    expect(page.locator(".row").first).to_be_visible()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.role") == "option":
            break
    for keys in ("End", "ArrowLeft", "Shift+ArrowLeft", "Shift+ArrowLeft"):
        page.keyboard.press(keys)
    assert page.locator(".token[aria-selected=true]").count() == 3
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Why “red”?")).to_be_visible()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "checkbox":
            break
    page.keyboard.press("Space")
    expect(page.get_by_role("region", name="Selected rows")).to_contain_text("1 row selected")


def test_the_address_shows_the_same_view_to_somebody_else(look: Look) -> None:
    page = look()
    ask(page)
    drag(page, 0, 2)
    expect(page.get_by_role("heading", name="Why “The”?")).to_be_visible()
    page.locator(".row").nth(1).get_by_role("button", name="Show in the answer").click()
    other = look(page.url.split("/", 3)[3])
    expect(other.get_by_role("heading", name="Why “The”?")).to_be_visible()
    assert ids(other) == ids(page)
    expect(other.locator(".row.shown")).to_have_attribute("data-id", ids(page)[1])
    expect(other.get_by_label("Prompt")).to_have_value(BAD["prompt"])


def test_without_an_answer_the_model_writes_one_which_the_address_then_has(look: Look) -> None:
    page = look()
    ask(page, "Where?", "")
    expect(page.get_by_role("heading", name="What the model wrote")).to_be_visible()
    written = page.get_by_label("Answer", exact=False).first.input_value()
    assert written
    assert urlencode({"generation": written}) in page.url


def test_opponents_and_a_rows_own_words_are_fetched_when_they_are_wanted(look: Look, service: Api) -> None:
    page = look()
    ask(page)
    bodies = asked(page)
    page.locator(".row").nth(1).get_by_role("button", name="Word by word").click()
    expect(page.locator(".row").nth(1).locator(".tokens.still")).to_be_visible()
    assert (bodies[-1]["tokens"], bodies[-1]["top_k"]) == ("train", 2)
    page.get_by_role("button", name="Pushed away from it").click()
    away = must(service.post("/influence", json={"index": "idx", **BAD, "direction": "opponents"}))["opponents"]
    expect(page.locator(".row")).to_have_count(len(away))
    assert ids(page) == [hit["id"] for hit in away]


def test_hostile_text_is_shown_and_does_nothing(look: Look) -> None:
    page = look(f"#/ask?{urlencode({'index': 'idx', 'prompt': 'Say it.', 'generation': HOSTILE[:40]})}")
    row = page.locator(".row", has_text=HOSTILE).first
    expect(row).to_be_visible()
    expect(row).to_contain_text("<b>bold</b>")
    row.get_by_role("button", name="Word by word").click()
    expect(page.locator(".tokens.still").first).to_be_visible()
    assert page.locator("main img, main script, main b:text('bold')").count() == 0
    page.goto(f"/#/ask?{urlencode({'index': HOSTILE, 'prompt': HOSTILE})}")
    expect(page.get_by_text("There is no ready index “<img")).to_be_visible()
    page.goto("/#/jobs/<img src=x onerror=window.hurt=1>")
    expect(page.get_by_role("alert")).to_contain_text("there is no job '<img src=x onerror")
    assert page.evaluate("window.hurt") is None


def test_what_a_newer_service_can_do_more_appears_by_itself_and_is_sent(look: Look, service: Api) -> None:
    document = must(service.get("/openapi.json"))
    added = {
        "precondition": {
            "type": "string",
            "enum": ["none", "fisher", "trackstar"],
            "default": "none",
            "description": "How.",
        }
    }
    added["candidates"] = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "description": "How many."}  # type: ignore[dict-item]
    document["components"]["schemas"]["InfluenceIn"]["properties"] |= added
    page = look("#/library")
    page.route("**/openapi.json", lambda route: route.fulfill(json=document))
    sent: list[dict[str, Any]] = []

    def answer(route: Route) -> None:
        sent.append(route.request.post_data_json)
        known = {name: value for name, value in sent[-1].items() if name not in added}
        found = must(service.post("/influence", json=known))
        found["proponents"][0] |= {"recall": {"score": 0.25, "rank": 17}, "by_norm": True}
        found["definition"] |= {"damping": 0.1}
        route.fulfill(json=found)

    page.route("**/influence", answer)
    page.goto("/#/ask")
    page.reload()
    page.get_by_text("Advanced").click()
    page.get_by_label("Correct for curvature").select_option("fisher")
    page.get_by_label("Candidates to re-rank").fill("40")
    ask(page)
    assert (sent[-1]["precondition"], sent[-1]["candidates"]) == ("fisher", 40)
    assert "precondition=fisher" in page.url
    expect(page.locator(".row").first).to_contain_text("by the index 17th, +0.250")
    expect(page.locator(".row").first).to_contain_text("here by the size of its gradient")
    page.get_by_text("Exactly").click()
    expect(page.locator(".meaning .facts")).to_contain_text("damping0.1")
    assert "normalize" not in sent[-1], "what was left as it was is left to the service"


MISTAKES = [
    ("Rows to show", "0", "greater than or equal to 1"),
    ("Rows to show", "100000", "top_k may be at most"),
    ("Only rows whose metadata match", "family", "This is not JSON"),
    ("Only rows whose metadata match", '{"year": {"above": 3}}', "is no condition"),
]


def test_a_mistake_is_told_at_the_field_that_it_is_in(look: Look) -> None:
    page = look()
    page.get_by_text("Advanced").click()
    page.get_by_label("Prompt").fill("Where?")
    for label, value, message in MISTAKES:
        control = page.get_by_label(label)
        usual = control.input_value()
        control.fill(value)
        page.get_by_role("button", name="Find the rows").click()
        expect(control).to_have_attribute("aria-invalid", "true")
        expect(control).to_be_focused()
        described = (control.get_attribute("aria-describedby") or "").split()
        expect(page.locator(f"#{described[-1]}")).to_contain_text(message)
        control.fill(usual)
        expect(control).not_to_have_attribute("aria-invalid", "true")


def test_an_empty_question_is_told_what_it_lacks(look: Look) -> None:
    page = look()
    page.get_by_role("button", name="Find the rows").click()
    expect(page.locator("form").get_by_role("alert")).to_contain_text("without a generation there must be a `prompt`")


def test_a_service_that_is_away_is_told_and_asked_again(look: Look) -> None:
    page = look("#/library")
    page.route("**/indexes?*", lambda route: route.abort())
    page.goto("/#/ask")
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer")
    page.unroute("**/indexes?*")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_label("Prompt")).to_be_visible()


def test_a_failure_of_the_service_is_told_with_the_request_that_its_log_has(look: Look) -> None:
    page = look()
    problem = {
        "type": "urn:headwater:problem:internal",
        "title": "Internal",
        "status": 500,
        "detail": "see the log",
        "errors": [],
        "request_id": "abc123",
    }
    page.route(
        "**/influence",
        lambda route: route.fulfill(status=500, body=json.dumps(problem), content_type="application/problem+json"),
    )
    page.get_by_label("Prompt").fill("Where?")
    page.get_by_role("button", name="Find the rows").click()
    expect(page.locator("form").get_by_role("alert")).to_have_text(re.compile("Internal.*see the log.*abc123"))


def test_a_service_without_an_index_says_how_to_get_one(look: Look, empty: Api) -> None:
    page = look("", empty)
    page.get_by_role("link", name="Open the library").click()
    expect(page.get_by_role("heading", name="No model yet")).to_be_visible()
    expect(page.get_by_text("It needs a registered model and a dataset")).to_be_visible()
