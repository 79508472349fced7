"""What recipients do with the campaign's mail: some open and click, some leave.

Opens and clicks are written where a tracking server would write them, for there is none here. Who leaves does it by mail, as mail programs do, to the address
in List-Unsubscribe of the message that came; the sensor `inbound_mail` has it read. What belongs here: being a recipient.
"""

from __future__ import annotations

import datetime as dt
import email
import re
import zlib
from email.message import EmailMessage
from pathlib import Path

from sqlalchemy.engine import Engine

from mail_pipelines.campaigns import store
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.demo import data
from mail_pipelines.dispatch.catcher.store import Kept, kept
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.messages.tokens import read_delivery

# Of so many recipients one leaves.
LEAVES_ONE_IN = 64
_MAILTO = re.compile(r"<mailto:([^>?]+)")


def react(engine: Engine, settings: Settings, key: str) -> None:
    """Let the recipients of a campaign that is out react to it."""
    with reading(engine) as connection:
        campaign = store.load(connection, key)
    # First, so that it is read meanwhile.
    _leave(settings, campaign.id)
    data.opens_and_clicks(engine, campaign.id, dt.datetime.now(dt.UTC))


def _leave(settings: Settings, campaign_id: int) -> None:
    maildir = InboundFolders.of(settings.inbound).mail / "unsubscribes"
    for folder in ("tmp", "new"):
        (maildir / folder).mkdir(parents=True, exist_ok=True)
    leaving = (message for message in kept(Path(settings.server.mail_folder)) if zlib.crc32(message.recipient.encode()) % LEAVES_ONE_IN == 0)
    for message in leaving:
        if read_delivery(message.token, settings.token_key()).campaign_id == campaign_id:
            (maildir / "tmp" / message.token).write_bytes(_request(message))
    # All at once: mail is read once a minute at most.
    for written in list((maildir / "tmp").iterdir()):
        written.rename(maildir / "new" / written.name)


def _request(message: Kept) -> bytes:
    address = _MAILTO.search(str(email.message_from_bytes(message.data())["List-Unsubscribe"]))
    assert address is not None
    request = EmailMessage()
    request["From"], request["To"], request["Subject"] = message.recipient, address[1], "unsubscribe"
    return request.as_bytes()
