"""PARD: a small language model that drafts all its tokens in one pass."""
