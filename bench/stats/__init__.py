"""Statistics: intervals, verdicts, latency, offline acceptance."""
