"""Tests of `mail_pipelines.provisioning`."""
