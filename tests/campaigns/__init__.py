"""Tests of `mail_pipelines.campaigns`."""
