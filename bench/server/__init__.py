"""Measuring servers over HTTP under load."""
