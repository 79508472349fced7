"""Settings as an installation has them after `init`."""

from __future__ import annotations

import pytest

from mail_pipelines import config


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    monkeypatch.setenv("MAIL_PIPELINES_SENDING__TOKEN_KEY", "a key for tests only, long enough")
    return config.load()
