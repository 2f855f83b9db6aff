"""Models by name: the pairs that every installation knows, folders, and models on the hub."""
