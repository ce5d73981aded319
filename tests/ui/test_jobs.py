"""What is done about the rows, watched live; the library; what rows are worth."""

import json
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from tests.api.harness import Api, jsonl, must, rows
from tests.ui.conftest import Look, ask


def select_two(page: Page) -> None:
    """Ask, and select the first two rows."""
    ask(page)
    for place in (0, 1):
        page.locator(".row").nth(place).get_by_role("checkbox").check()
    page.get_by_role("button", name="Make the model forget them…").click()


def jobs(service: Api) -> list[dict[str, Any]]:
    return list(must(service.get("/jobs"))["items"])


def test_rows_are_forgotten_after_a_look_at_what_that_would_do(look: Look, service: Api, tmp_path: Path) -> None:
    page = look()
    before = len(jobs(service))
    select_two(page)
    dialog = page.get_by_role("dialog", name="Forget 2 rows")
    start = dialog.get_by_role("button", name="Start")
    expect(start).to_be_disabled()
    dialog.get_by_label("What should it say instead?").fill("Nobody knows.")
    expect(dialog.get_by_label("Name of the new model")).to_have_value("tiny-clean")
    dialog.get_by_role("button", name="Preview").click()
    expect(dialog.get_by_text("What would be done")).to_be_visible()
    facts = dialog.locator(".facts")
    expect(facts).to_contain_text("Forgets2 rows")
    expect(facts).to_contain_text("Methodrenew")
    expect(facts).to_contain_text("not known yet")
    dialog.get_by_text("Rows to forget").click()
    expect(dialog.locator("ins").first).to_have_text("Nobody knows.")
    assert len(jobs(service)) == before, "a look changes nothing"

    dialog.get_by_label("What should it say instead?").fill("I do not know.")
    expect(start).to_be_disabled()
    dialog.get_by_role("button", name="Preview").click()
    start.click()
    expect(page.get_by_role("heading", name="Forget rows")).to_be_visible()
    expect(page.locator(".pill")).to_have_text("succeeded")
    job = jobs(service)[0]
    assert (job["kind"], job["state"], page.url.rpartition("/")[2]) == ("unlearn", "succeeded", job["id"])
    report = page.get_by_role("row", name="Loss of the forgotten rows")
    measured = must(service.get(f"/jobs/{job['id']}/artifacts/report.json"))["measures"]["forget_loss"]
    expect(report).to_contain_text(f"{measured['before']['value']:.3f}")
    expect(report).to_contain_text(f"{measured['after']['value']:.3f}")

    with page.expect_download() as download:
        page.get_by_role("button", name="Download adapter/adapter_config.json").click()
    download.value.save_as(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["peft_type"] == "LORA"
    with page.context.expect_page() as opened:
        page.get_by_role("button", name="Open the whole report").click()
    expect(opened.value.get_by_role("heading").first).to_be_visible()

    page.get_by_role("link", name="Build its index").click()
    form = page.locator("details", has_text="Build an index")
    expect(form.get_by_label("Model")).to_have_value("tiny-clean")
    form.get_by_role("button", name="Build").click()
    page.get_by_role("link", name="Ask the same question again").click()
    expect(page.get_by_role("heading", name="What the model wrote")).to_be_visible()


def test_what_unlearning_refuses_is_told_in_the_dialog(look: Look) -> None:
    page = look()
    select_two(page)
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name of the new model").fill("no spaces, please")
    dialog.get_by_role("button", name="Preview").click()
    expect(dialog.get_by_label("Name of the new model")).to_have_attribute("aria-invalid", "true")
    dialog.get_by_label("Name of the new model").fill("")
    dialog.get_by_text("Advanced").click()
    dialog.get_by_label("Method").select_option("relabel")
    dialog.get_by_role("button", name="Preview").click()  # which shows what answers are to be written for
    dialog.get_by_role("button", name="Start").click()
    expect(dialog.get_by_label("What should it say instead?")).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_an_upload_becomes_an_index_that_is_watched_cancelled_and_gone_on_with(look: Look, service: Api) -> None:
    page = look("#/library")
    page.get_by_text("Upload a dataset").click()
    form = page.locator("details", has_text="Upload a dataset")
    page.get_by_label("File").set_input_files(
        {"name": "broken.jsonl", "mimeType": "text/plain", "buffer": b'{"prompt": "a", "response": "b"}\n{"prompt": '}
    )
    form.get_by_role("button", name="Upload").click()
    expect(form.get_by_text("line 2").first).to_be_visible()
    page.get_by_label("File").set_input_files(
        {"name": "many.jsonl", "mimeType": "text/plain", "buffer": jsonl(rows(3000, start=100))}
    )
    form.get_by_label("Name").fill("many")
    form.get_by_role("button", name="Upload").click()
    expect(page.get_by_role("row", name="many.jsonl")).to_contain_text("3,000")

    page.get_by_text("Build an index").click()
    form = page.locator("details", has_text="Build an index")
    form.get_by_label("Name").fill("idx")
    form.get_by_label("Training rows").select_option("many")
    form.get_by_role("button", name="Build").click()
    expect(form.locator("[role=alert], .field-error").filter(has_text="idx")).to_be_visible()
    form.get_by_label("Name").fill("slow")
    form.get_by_role("button", name="Build").click()
    told = page.get_by_text("rows a second")
    expect(told).to_be_visible()
    far = told.inner_text()
    expect(told).not_to_have_text(far)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".pill")).to_have_text("cancelled")
    page.get_by_role("button", name="Try again from where it stopped").click()
    expect(page.locator(".pill")).to_have_text("running")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".pill")).to_have_text("cancelled")


def test_a_stream_of_events_that_breaks_is_taken_up_again(look: Look, service: Api) -> None:
    job = jobs(service)[-1]
    page = look("#/library")
    tries: list[str] = []

    def break_once(route: Any) -> None:
        tries.append(route.request.url)
        if len(tries) == 1:
            route.abort()
        else:
            route.continue_()

    page.route("**/events", break_once)
    page.goto(f"/#/jobs/{job['id']}")
    expect(page.locator(".pill")).to_have_text("succeeded")
    assert len(tries) == 2


def test_the_library_says_what_was_left_out(look: Look, service: Api) -> None:
    page = look("#/library")
    model = must(service.get("/models/tiny"))
    section = page.get_by_role("region", name="Models")
    section.get_by_role("row", name="tiny").first.get_by_role("button", name="Details").click()
    for group in model["skipped_groups"]:
        expect(section.get_by_text(group["reason"]).first).to_be_visible()
    section = page.get_by_role("region", name="Indexes")
    section.get_by_role("row", name="idx").first.get_by_role("button", name="Details").click()
    expect(section.get_by_text(f"{len(model['skipped'])} skipped")).to_be_visible()
    expect(section.get_by_text("Rows cut at the limit")).to_be_visible()


def test_values_are_drawn_and_paged(look: Look, service: Api) -> None:
    page = look("#/valuations")
    page.get_by_label("Rows to value").select_option("facts")
    page.get_by_label("Validation rows").select_option("held")
    page.get_by_label("Model").select_option("tiny")
    page.get_by_role("button", name="Value them").click()
    page.get_by_role("link", name="See the values").click()
    valuation = page.url.rpartition("/")[2]
    summary = must(service.get(f"/valuations/{valuation}"))["summary"]
    counts = summary["distribution"]["histogram"]["counts"]
    expect(page.get_by_role("img", name=f"Values of {sum(counts):.0f} rows")).to_be_visible()
    assert page.locator("svg rect").count() == len(counts)
    for warning in summary["warnings"]:
        expect(page.get_by_text(warning)).to_be_visible()
    scores = must(service.get(f"/valuations/{valuation}/scores", params={"limit": 20}))["items"]
    section = page.get_by_role("region", name="Rows")
    lines = section.locator("tbody tr")
    expect(lines).to_have_count(len(scores))
    expect(lines.first).to_contain_text(scores[0]["response"])
    section.get_by_label("Show").select_option("asc")
    expect(lines.first).to_contain_text(str(scores[-1]["rank"]))
    expect(lines.first).to_contain_text(scores[-1]["response"])


def test_values_come_a_page_at_a_time(look: Look) -> None:
    page = look()
    asked: list[str] = []

    def answer(route: Any) -> None:
        asked.append(route.request.url)
        first = "cursor" not in route.request.url
        one = {
            "id": "a",
            "uncertainty": None,
            "labelled": True,
            "tokens": 5,
            "price": None,
            "prompt": "p",
            "response": "r",
            "metadata": {},
        }
        item = {**one, "rank": 1 if first else 2, "value": 0.5 if first else -0.5}
        route.fulfill(json={"items": [item], "next_cursor": "1" if first else None})

    shape = {"mean": 0, "std": 1, "quantiles": {"0.5": 0}, "histogram": {"counts": [1, 1], "edges": [-1, 0, 1]}}
    found: dict[str, Any] = {"distribution": shape, "negative_share": 0.5, "rows": 2, "validation_loss": {"all": 1.0}}
    found |= {"warnings": ["mind"], "near_duplicates": {"rows": 0}, "groups": {"all": 2}}
    page.route(
        "**/valuations/job_1", lambda route: route.fulfill(json={"id": "job_1", "state": "succeeded", "summary": found})
    )
    page.route("**/valuations/job_1/scores*", answer)
    page.goto("/#/valuations/job_1")
    expect(page.get_by_text("Ranks 1 to 1")).to_be_visible()
    expect(page.get_by_role("button", name="Previous")).to_be_disabled()
    page.get_by_role("button", name="Next").click()
    expect(page.get_by_text("Ranks 2 to 2")).to_be_visible()
    assert "cursor=1" in asked[-1]
    expect(page.get_by_role("button", name="Next")).to_be_disabled()
    page.get_by_role("button", name="Previous").click()
    expect(page.get_by_text("Ranks 1 to 1")).to_be_visible()
