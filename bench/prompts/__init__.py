"""Prompts: every source they come from, and their token ids."""
