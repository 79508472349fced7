"""The program `mail-pipelines`, which is also `python -m mail_pipelines`."""

from __future__ import annotations

from mail_pipelines.imports import uncollected


def main() -> None:
    with uncollected():
        from mail_pipelines import cli
    cli.main()


if __name__ == "__main__":
    main()
