"""The root of the project's exception tree.

Each package derives its own errors from `MailPipelinesError`. A message says what was given, what was expected
and what to do next; commands print it without a traceback.
"""


class MailPipelinesError(Exception):
    """A mistake or condition the user can act on."""
