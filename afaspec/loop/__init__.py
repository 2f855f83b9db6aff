"""Keeping a served draft fresh: what its traffic says of it."""
