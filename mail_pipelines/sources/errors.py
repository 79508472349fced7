"""What goes wrong with a source. Messages name no person and hold no secret: they are kept in the database and shown in Dagster."""

from __future__ import annotations

from mail_pipelines.errors import MailPipelinesError


class SourceError(MailPipelinesError):
    """A source that cannot be read or merged now; what was merged before stays."""


class DeclarationError(SourceError):
    """A file that declares no source; the message begins with the file and the place in it."""


class GuardStopped(SourceError):
    """More records vanished at once than the declaration permits: somebody has to say that they are meant to be gone."""


class LoginError(SourceError):
    """A source that refuses what it is logged in with; waiting changes nothing."""
