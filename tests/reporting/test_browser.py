"""The page in a browser: it opens, sorts, filters, shows every image, and logs no error.

Needs Playwright and a Chromium (Debian's: `apt-get install chromium`); skipped where either is absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowra.files import write_text
from lowra.reporting.page import page_of
from tests.reporting.test_page import with_outputs

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("browser")
    return write_text(place / "report.html", page_of(with_outputs(place))).as_uri()


@pytest.fixture(params=[(1400, 900), (390, 844)], ids=["wide", "phone"])
def opened(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[tuple[Any, list[str]]]:
    width, height = request.param
    said: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": height})
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: said.append(sent.url) if sent.url.startswith("http") else None)
    page.goto(address)
    yield page, said
    page.close()


def test_it_opens_without_a_word_and_shows_every_image(opened: tuple[Any, list[str]]) -> None:
    page, said = opened
    page.wait_for_load_state("load")
    broken = page.evaluate("[...document.images].filter((i) => !i.complete || !i.naturalWidth).length")
    assert broken == 0
    assert page.evaluate("document.images.length") > 20
    assert said == []
    # Tables scroll in their own boxes; the page itself is no wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_links_lead_to_places_on_the_page(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    lost = page.evaluate(
        "[...document.querySelectorAll('a')].map((a) => a.getAttribute('href'))"
        ".filter((h) => !h.startsWith('#') || !document.getElementById(h.slice(1)))"
    )
    assert lost == []


def test_the_leaderboard_sorts_both_ways_by_number_and_filters(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    heads = page.eval_on_selector_all("#board thead th", "all => all.map((th) => th.textContent.trim())")
    column = next(i for i, head in enumerate(heads) if head.startswith("W-Error"))

    def values() -> list[float]:
        texts = page.eval_on_selector_all(
            "#board tbody tr:not([hidden])", f"rows => rows.map((row) => row.cells[{column}].dataset.value)"
        )
        return [float(text) for text in texts]

    button = page.locator("#board thead th button").nth(column)
    button.click()
    assert values() == sorted(values())
    assert page.locator("#board thead th").nth(column).get_attribute("aria-sort") == "ascending"
    button.click()
    assert values() == sorted(values(), reverse=True)
    page.fill("#filter", "three vit")
    rows = page.locator("#board tbody tr:not([hidden])").all_text_contents()
    assert len(rows) == 4
    assert all("three" in row and "ViT" in row for row in rows)


def test_dark_and_light(browser: Any, address: str) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    for scheme, background in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 28)")):
        page = browser.new_page(color_scheme=scheme)
        page.goto(address)
        assert page.evaluate(colour) == background
        page.click("#theme")
        assert page.evaluate(colour) != background
        page.close()


def test_screenshots_can_be_looked_at(browser: Any, address: str, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(address)
    picture = tmp_path / "page.png"
    page.screenshot(path=str(picture))
    assert picture.stat().st_size > 20_000
    page.close()
