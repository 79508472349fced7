"""The Dagster UI in a real browser: the graph by group, one shard started by hand, the picture that the README shows."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from mail_pipelines.home import checkout
from tests.e2e.platform import Platform
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200), pytest.mark.xdist_group("platform")]
PICTURE = checkout() / "docs" / "images" / "ui.png"
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    # Else each frame is drawn by an emulated graphics card.
    "--disable-software-rasterizer",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    """One for all: each new one would load and compile the UI's code again."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "script/test installs chromium"
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=OPTIONS)
        context = started.new_context(viewport={"width": 1440, "height": 820}, reduced_motion="reduce")
        context.set_default_timeout(180_000)
        expect.set_options(timeout=400_000)
        yield context
        started.close()


@pytest.fixture
def page(browser: BrowserContext) -> Iterator[Page]:
    page = browser.new_page()
    yield page
    page.close()


def test_a_shard_started_from_the_ui_is_seen_to_finish(platform: Platform, page: Page) -> None:
    """The sensor that starts send runs is off: the only run of this campaign is the one a person starts."""
    platform.sensor("stop", "open_shards")
    platform.schedule("by-hand")
    wait_for(lambda: platform.campaign("by-hand").state == "sending", seconds=300, what="the freeze")
    page.goto(f"{platform.address}/assets/send_batches?view=partitions")
    page.get_by_role("button", name="Materialize").first.click()
    dialog = page.get_by_role("dialog")
    for value in ("by-hand", "00"):
        dialog.get_by_text("Select a partition or create one").first.click()
        page.wait_for_function("document.activeElement instanceof HTMLInputElement")
        page.keyboard.type(value)
        page.get_by_text("Select all (1)").click()
        dialog.get_by_text("Launch runs to materialize").click()
    page.get_by_role("button", name="Launch 1 run").click()
    run = wait_for(lambda: platform.newest_run("by-hand|00"), seconds=300, what="the launched run")
    page.goto(f"{platform.address}/runs/{run}")
    expect(page.get_by_text("Success", exact=True).first).to_be_visible(timeout=400_000)
    totals = platform.totals("by-hand")
    assert totals.open == 0
    assert totals.delivered > 2_000
    assert set(platform.copies("by-hand").values()) == {1}
    page.goto(f"{platform.address}/assets/send_batches?partition=by-hand%7C00&view=partitions")
    expect(page.get_by_text("Materialized", exact=True).first).to_be_visible()
    platform.sensor("start", "open_shards")


def test_results_show_numbers_tables_and_a_plot(platform: Platform, page: Page) -> None:
    platform.wait_finished("by-hand")
    wait_for(lambda: platform.reported("by-hand"), seconds=300, what="results")
    page.goto(f"{platform.address}/assets/delivery_results?partition=by-hand&view=partitions")
    for words in ("delivered", "by_provider", "by_server", "microsoft"):
        expect(page.get_by_text(words, exact=True).first).to_be_attached()
    page.get_by_text("[Show Markdown]").first.click()
    pictures = page.locator("img[src^='data:image/png']")
    expect(pictures.first).to_be_attached()
    assert pictures.first.evaluate("image => image.naturalWidth") > 300


def test_the_graph_shows_its_groups_with_all_assets(platform: Platform, page: Page, tmp_path: Path) -> None:
    page.goto(f"{platform.address}/asset-groups/")
    graph = page.locator("svg")
    expect(graph.get_by_text("reporting").first).to_be_visible()
    # The UI's own short cut for "Expand all groups".
    page.keyboard.press("Alt+e")
    # Long names are cut in the middle.
    for name in (
        "contact_snapshot",
        "engage.*_snapshot",
        "recipient_segments",
        "campaign_audiences",
        "send_batches",
        "delivery_logs",
        "delivery_results",
        "campai.*_statistics",
    ):
        expect(graph.get_by_text(re.compile(f"^{name}$")).first).to_be_visible()
    shot = page.screenshot(path=tmp_path / "ui.png")
    assert len(shot) > 40_000
    # The README's picture is this one; it is made anew when asked for, so that a test run leaves a checkout as it was.
    if os.environ.get("UPDATE_PICTURES") or not PICTURE.exists():
        PICTURE.parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "ui.png", PICTURE)


@pytest.mark.parametrize("place", ["runs", "jobs", "automation", "deployment", "overview", "assets"])
def test_every_page_opens_without_an_error(platform: Platform, page: Page, place: str) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{platform.address}/{place}")
    page.wait_for_load_state("networkidle")
    assert errors == []
    assert not page.get_by_text(re.compile("unexpected error|went wrong", re.IGNORECASE)).count()
