"""Commands about a server that runs."""
