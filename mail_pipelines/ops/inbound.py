"""Reading mail that came back, as an op job: it acts on recipients of all campaigns, and is no data set."""

import datetime as dt

import dagster as dg

from mail_pipelines.inbound import reading
from mail_pipelines.resources.database import CentralDatabase


@dg.op(out=dg.Out(dg.Nothing))
def read_mail(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Read what waits in the maildirs (and the mailbox, if there is one); how many messages of which kind is the metadata."""
    report = reading.read(database.engine, database.settings, dt.datetime.now(dt.UTC))
    context.add_output_metadata(report.numbers())
    context.log.info("read: %s", report.numbers())


@dg.job(description="Read bounces, complaints and unsubscribing by mail into the ledger. Requested by a sensor when there are any.")
def read_inbound_mail() -> None:
    read_mail()
