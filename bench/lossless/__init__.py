"""Whether drafting changed the output: greedy and sampled."""
