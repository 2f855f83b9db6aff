"""How the target writes: in this process, in vLLM's engine beside it, or on a server."""
