"""vLLM's engine in a child process."""
