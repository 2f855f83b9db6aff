"""Whose forward gives the hidden states of finished texts: transformers' in this process, or vLLM's
beside it."""
