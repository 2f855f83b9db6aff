"""vLLM's OpenAI server, started and watched."""
