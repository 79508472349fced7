"""Tests of `mail-pipelines simulate`."""
