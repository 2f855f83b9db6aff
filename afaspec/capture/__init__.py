"""Capture: the target answers prompts, and its hidden states are stored."""
