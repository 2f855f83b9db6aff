"""What a server was asked and what it said, kept as its owner allows."""
