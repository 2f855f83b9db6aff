"""Sweeps over k, load and temperature, and what-ifs on them."""
