"""Floor 3: prompts, acceptance, throughput, statistics and the report."""
