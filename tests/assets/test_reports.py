"""The assets of results and reports, materialised as Dagster does it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pandas as pd
import pytest
import sqlalchemy as sa

from mail_pipelines import partitions
from mail_pipelines.assets import markdown
from mail_pipelines.assets.delivery import delivery_results
from mail_pipelines.assets.reporting import campaign_statistics
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Delivery, Link, State
from mail_pipelines.delivery import engagement, statistics
from mail_pipelines.resources.database import CentralDatabase
from tests.campaigns.parts import make_campaign
from tests.delivery.results import START, add_claims, add_reactions, make_results, set_campaign, some_outcomes

RECIPIENTS = 300
CAMPAIGN = "spring-sale"
PICTURES = {"states", "messages_per_minute", "opens_and_clicks", "unsubscribes_and_complaints"}


@pytest.fixture
def instance(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """A Dagster instance with the campaign's partition; the central database is the engine's."""
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", engine.url.render_as_string(hide_password=False))
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(partitions.campaigns.name or "", [CAMPAIGN])
        yield instance


def materialize(instance: dg.DagsterInstance, *, raise_on_error: bool = True) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [delivery_results, campaign_statistics],
        partition_key=CAMPAIGN,
        instance=instance,
        resources={"database": CentralDatabase()},
        raise_on_error=raise_on_error,
    )


def metadata_of(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node(asset)
    return {name: value.value for name, value in event.metadata.items()}


def checks_of(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()}


@pytest.mark.slow
def test_metadata_are_the_numbers_tables_and_pictures_of_the_domain(engine: sa.Engine, instance: dg.DagsterInstance) -> None:
    campaign = make_results(engine, RECIPIENTS, some_outcomes(RECIPIENTS), excluded={"unsubscribe": 3})
    add_claims(engine, campaign.id, [(1, 0, 9), (2, 5, 14)])
    add_reactions(engine, campaign.id, RECIPIENTS)
    result = materialize(instance)
    delivery, reactions = metadata_of(result, "delivery_results"), metadata_of(result, "campaign_statistics")
    with reading(engine) as connection:
        found, engaged = statistics.read(connection, campaign), engagement.read(connection, campaign)

    assert delivery["dagster/partition_row_count"] == RECIPIENTS
    assert {name: delivery[name] for name in found.numbers()} == found.numbers()
    assert delivery["overlap"] == round(5 / 15, 4)
    assert {name: reactions[name] for name in engaged.numbers()} == engaged.numbers()
    assert "| alpha |" in delivery["by_server"]
    assert "| invalid_recipient |" in delivery["by_reason"]
    assert "| https://shop.test/1 |" in reactions["top_links"]
    for name, value in (delivery | reactions).items():
        if name in PICTURES:
            picture = re.fullmatch(r"!\[[\w ]+\]\(data:image/png;base64,([\w+/=]+)\)", value)
            assert picture is not None
            assert base64.b64decode(picture[1]).startswith(b"\x89PNG")
    assert {check: evaluation.passed for check, evaluation in checks_of(result).items()} == dict.fromkeys(
        ("sums_hold", "one_state_per_row", "none_twice", "none_suppressed_delivered"), True
    ) | {"bounce_rate": found.rates.hard_bounced <= 0.02}


@pytest.mark.slow
def test_nothing_that_dagster_keeps_names_a_person(engine: sa.Engine, instance: dg.DagsterInstance) -> None:
    campaign = make_results(engine, RECIPIENTS, some_outcomes(RECIPIENTS))
    add_reactions(engine, campaign.id, RECIPIENTS)
    result = materialize(instance)
    kept = [metadata_of(result, "delivery_results"), metadata_of(result, "campaign_statistics")]
    kept += [evaluation.metadata | {"description": evaluation.description} for evaluation in checks_of(result).values()]
    logged = [record.event_log_entry.user_message for record in instance.get_records_for_run(result.run_id).records]
    text = "\n".join(logged) + repr([{name: value for name, value in metadata.items() if name not in PICTURES} for metadata in kept])
    assert "delivered" in text
    assert "@" not in text
    assert "person" not in text


def test_a_suppressed_recipient_that_was_mailed_shows_as_a_failed_check(engine: sa.Engine, instance: dg.DagsterInstance) -> None:
    make_results(engine, RECIPIENTS, some_outcomes(RECIPIENTS))
    with reading(engine) as connection:
        mailed = connection.execute(sa.select(Delivery.address_hash).where(Delivery.state == int(State.DELIVERED)).limit(2)).scalars().all()
    transact(engine, lambda connection: consent.suppress(connection, mailed, reason="complaint", now=START))
    result = materialize(instance)
    check = checks_of(result)["none_suppressed_delivered"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert check.metadata["suppressed_addresses"].value == 2
    # The numbers are true all the same, so the report is made.
    assert result.asset_materializations_for_node("campaign_statistics")


def test_a_ledger_that_contradicts_its_counters_blocks_the_report(engine: sa.Engine, instance: dg.DagsterInstance) -> None:
    make_results(engine, RECIPIENTS, some_outcomes(RECIPIENTS))
    transact(engine, lambda connection: connection.execute(sa.delete(Delivery).where(Delivery.contact_id == 5)))
    result = materialize(instance, raise_on_error=False)
    assert not result.success
    assert not checks_of(result)["one_state_per_row"].passed
    # What was found is kept, with the failed check beside it.
    assert metadata_of(result, "delivery_results")["audience"] == RECIPIENTS
    assert result.asset_materializations_for_node("campaign_statistics") == []


@pytest.mark.slow
def test_a_campaign_in_any_state_can_be_reported(engine: sa.Engine, instance: dg.DagsterInstance) -> None:
    campaign = make_campaign(engine)
    for state in CampaignState:
        set_campaign(engine, campaign, state=state.value)
        result = materialize(instance)
        assert metadata_of(result, "delivery_results")["state"] == state
        assert all(evaluation.passed for evaluation in checks_of(result).values())


def test_a_partition_without_campaign_says_so(engine: sa.Engine, instance: dg.DagsterInstance) -> None:
    with pytest.raises(Exception, match="there is no campaign 'spring-sale'"):
        materialize(instance)


# --- the form of tables ---


def test_a_table_shows_numbers_for_people_and_escapes_its_own_marks() -> None:
    frame = pd.DataFrame({"url": ["https://shop.test/a|b"], "total_clicks": [12345], "share": [0.12345], "first": pd.to_datetime(["2026-03-02T09:30:59Z"])})
    assert markdown.table(frame).md_str == (
        "| url | total clicks | share | first |\n|---|---:|---:|---|\n| https://shop.test/a\\|b | 12,345 | 12.35% | 2026-03-02 09:30 |"
    )


def test_a_long_table_is_cut_and_says_so() -> None:
    text = markdown.table(pd.DataFrame({"number": range(1200)})).md_str or ""
    assert text.endswith("\n… and 1,150 more")
    assert "| 49 |" in text
    assert "| 50 |" not in text


def test_a_link_no_longer_known_leaves_its_clicks_in_the_totals(engine: sa.Engine, instance: dg.DagsterInstance) -> None:
    campaign = make_results(engine, 50, some_outcomes(50))
    reactions = add_reactions(engine, campaign.id, 50)
    transact(engine, lambda connection: connection.execute(sa.delete(Link)))
    found = metadata_of(materialize(instance), "campaign_statistics")
    assert found["clicks"] == sum(reaction.kind == "click" and not reaction.machine for reaction in reactions)
