"""Finished runs beside each other: comparison, and the gate of a CI job."""
