"""Tests of `mail_pipelines.messages`."""
