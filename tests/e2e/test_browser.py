"""The Dagster UI in a real browser: the graph by group, a shard started by hand, the picture that the README shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from mail_pipelines.home import checkout
from tests.e2e.platform import Platform
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(420), pytest.mark.xdist_group("platform")]
SHOTS = checkout() / "docs" / "images"
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    chromium = shutil.which("chromium")
    assert chromium is not None, "script/test installs chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def test_the_graph_shows_its_groups_and_assets(platform: Platform, page: Page, tmp_path: Path) -> None:
    page.goto(f"{platform.address}/asset-groups/")
    for name in ("contact_snapshot", "campaign_audiences", "send_batches", "delivery_results", "campaign_statistics"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    page.screenshot(path=tmp_path / "graph.png")
    assert (tmp_path / "graph.png").stat().st_size > 20_000


def test_a_shard_started_from_the_ui_is_seen_to_finish(platform: Platform, page: Page) -> None:
    platform.schedule("third", seconds=3600)
    wait_for(lambda: "third" in _keys(platform), seconds=60, what="the campaign's key")
    page.goto(f"{platform.address}/assets/send_batches?view=partitions")
    page.get_by_role("button", name="Materialize").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.screenshot(path=Path(platform.settings.home) / "dialog.png")


def _keys(platform: Platform) -> list[str]:
    import dagster as dg

    with dg.DagsterInstance.from_config(str(platform.settings.dagster_home)) as instance:
        return list(instance.get_dynamic_partitions("campaigns"))
