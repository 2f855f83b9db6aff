"""Measuring drafts in vLLM engines of this process's own."""
