"""What single operations cost, beside their plain twins: scripts, each `python -m`."""
