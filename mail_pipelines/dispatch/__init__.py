"""Sending on one server: claims, pacer, permit, journal, settlement, the session that ties them, and the built-in mail catcher."""
