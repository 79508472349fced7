"""`python -m mail_pipelines`: the same as `mail-pipelines`."""

from __future__ import annotations

from mail_pipelines.cli import main

main()
