"""A capture by several workers at once, each taking parts of the prompts: over Ray."""
