"""The embedded pair: a small code model and its EAGLE-3 draft, which ship inside the package."""
