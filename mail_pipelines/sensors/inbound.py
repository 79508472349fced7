"""Mail that came back and waits to be read."""

from __future__ import annotations

import time

import dagster as dg

from mail_pipelines.inbound import reading
from mail_pipelines.ops.inbound import read_inbound_mail
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.sensors.runs import unfinished
from mail_pipelines.sensors.ticks import instance_of

# Mail is read so often at most: a run takes seconds, whether it has one message to read or thousands. A mailbox has to be asked.
FILES_SECONDS = 60
MAILBOX_SECONDS = 300


def inbound_mail(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.RunRequest | dg.SkipReason:
    """Have mail read: at most once a minute while files wait, and every five minutes where a mailbox is polled."""
    settings = database.settings
    if reading.files_wait(settings):
        period = FILES_SECONDS
    elif settings.inbound.imap_url:
        period = MAILBOX_SECONDS
    else:
        return dg.SkipReason(f"no mail waits in {settings.inbound.folder}")
    if unfinished(instance_of(context), read_inbound_mail.name):
        return dg.SkipReason("mail is being read")
    return dg.RunRequest(run_key=f"inbound:{period}:{int(time.time()) // period}")
