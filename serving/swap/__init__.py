"""Another draft for a running vLLM: whether it may take the old one's place, and how it does."""
