"""How destinations behave is a file: the one of the command, of the installation, or the catchers' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from mail_pipelines import config
from mail_pipelines.dispatch.catcher import process
from mail_pipelines.dispatch.catcher.play import DEFAULT_RULES, load_rules
from mail_pipelines.dispatch.files import DispatchError


def test_destinations_are_played_by_the_file_of_the_command_or_of_the_installation_or_the_catchers_own(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours.toml", tmp_path / "others.toml"
    ours.write_text('[[rule]]\ndomains = ["*"]\nrefuse_percent = 100\nrefusals = ["550 5.1.1 Nobody here"]\n')
    others.write_text('[[rule]]\ndomains = ["*"]\nrefuse_percent = 100\nrefusals = ["550 5.2.2 Full"]\n')
    plain, set_up = (config.load({"MAIL_PIPELINES_HOME": str(tmp_path), **given}) for given in ({}, {"MAIL_PIPELINES_SERVER__PLAY": str(ours)}))
    assert process.play_of(plain).rules == load_rules(DEFAULT_RULES)
    for play, words in ((process.play_of(set_up), "Nobody here"), (process.play_of(set_up, others), "Full")):
        refusal = play.at_recipient("a@google.test", 0)
        assert refusal is not None
        assert refusal.text == words


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DispatchError, match=r"gone\.toml"):
        process.play_of(config.load({"MAIL_PIPELINES_HOME": str(tmp_path), "MAIL_PIPELINES_SERVER__PLAY": "/nowhere/gone.toml"}))
