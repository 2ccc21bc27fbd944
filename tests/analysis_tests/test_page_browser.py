"""The page in a real headless Chromium: no network, no console errors, and its controls work."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.report import ReportOptions, report_of_frame

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def page(sweep_frame, tmp_path_factory) -> Iterator[tuple[object, list[str]]]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    out: Path = tmp_path_factory.mktemp("page")
    options = ReportOptions(metrics=("ndcg_at_10",), resamples=200, fold_repeats=1, jobs=1)
    report = report_of_frame(sweep_frame(datasets=("demo", "other")), out, options=options)
    trouble: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.set_default_timeout(90_000)
        tab.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: trouble.append(str(error)))
        tab.on("requestfailed", lambda request: trouble.append(request.url[:100]))
        tab.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("file:", "data:", "blob:"))
                else trouble.append(request.url[:100])
            ),
        )
        tab.goto(report.index.as_uri())
        tab.wait_for_selector("#scatter .points path")
        yield tab, trouble
        browser.close()


def test_it_loads_without_errors_or_requests(page):
    tab, trouble = page
    assert trouble == []
    assert tab.locator("#scatter .points path").count() == 48
    assert tab.locator("figure img").count() >= 5
    assert tab.evaluate("document.querySelector('figure img').alt.length") > 40


def test_hover_shows_the_command_of_the_run(page):
    tab, _ = page
    tab.locator("#scatter").scroll_into_view_if_needed()
    box = tab.locator("#scatter .points path").nth(3).bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.wait_for_selector("#scatter .hoverlayer .hovertext")
    text = tab.locator("#scatter .hoverlayer").text_content()
    assert "srsweep train --dataset" in text
    assert "batch size" in text


def test_the_slider_bounds_memory_from_the_keyboard(page):
    tab, _ = page
    slider = tab.locator("#budget")
    assert tab.locator("#budget-value").text_content() == "no limit"
    slider.focus()
    slider.press("Home")
    assert tab.locator("#budget-value").text_content().endswith("GiB")
    assert tab.locator("#best tbody tr").count() >= 1
    least = float(tab.locator("#best tbody td.number").nth(0).text_content())
    slider.press("End")
    most = float(tab.locator("#best tbody td.number").nth(0).text_content())
    assert least < most


def test_the_table_sorts_and_says_so(page):
    tab, _ = page
    button = tab.locator('#table th button[data-column="batch_size"]')
    button.click()
    head = tab.locator('#table th:has(button[data-column="batch_size"])')
    assert head.get_attribute("aria-sort") == "ascending"
    assert tab.locator("#table tbody tr").first.locator("td").nth(4).text_content() == "32"
    tab.locator('#table th button[data-column="batch_size"]').press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert tab.locator("#table tbody tr").first.locator("td").nth(4).text_content() == "512"


def test_brushing_hides_runs_everywhere(page):
    tab, trouble = page
    box = tab.locator('#brushes input[data-brush="dataset"]').first
    box.uncheck()
    assert tab.locator("#count").text_content() == "24 of 48 runs shown."
    assert tab.locator("#scatter .points path").count() == 24
    box.check()
    tab.locator("#theme").click()
    assert tab.evaluate("document.documentElement.dataset.theme") in {"dark", "light"}
    assert trouble == []


def test_a_row_of_the_table_is_a_line_high(page):
    tab, _ = page
    heights = [row.bounding_box()["height"] for row in tab.locator("#table tbody tr").all()[:5]]
    assert max(heights) < 60
