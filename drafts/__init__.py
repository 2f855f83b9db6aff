"""Floor 1: draft architectures as small torch modules, and their checkpoint formats."""
