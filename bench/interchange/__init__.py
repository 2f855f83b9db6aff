"""Runs that other load generators measured: reading them as ours, and writing ours as theirs."""
