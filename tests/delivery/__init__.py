"""Tests of `mail_pipelines.delivery`."""
