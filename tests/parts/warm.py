"""What the process imports of which tests' servers and sessions are forks (`forks`)."""

from __future__ import annotations

import importlib

from mail_pipelines.imports import uncollected

_NAMES = [
    "encodings.idna",
    "mail_pipelines.cli",
    "mail_pipelines.dispatch.catcher.process",
    "mail_pipelines.dispatch.exim.log",
    "mail_pipelines.dispatch.exim.process",
    "mail_pipelines.dispatch.session",
    "mail_pipelines.metrics.server",
    "pymysql",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.dialects.mysql.pymysql",
    "tests.dispatch.sessions",
]

with uncollected():
    for _name in _NAMES:
        importlib.import_module(_name)
    importlib.import_module("mail_pipelines.cli").command()
