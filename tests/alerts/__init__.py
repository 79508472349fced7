"""Tests of `mail_pipelines.alerts`."""
