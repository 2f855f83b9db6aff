"""What draft modules are made of."""
