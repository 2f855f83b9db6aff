"""Floor 2: vLLM engine, server, runtime environment, metrics and compatibility."""
