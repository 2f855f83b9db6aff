"""Draft checkpoints on disk: what they say, and filling modules from them."""
