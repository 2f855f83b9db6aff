"""Commands that adapt a draft: capture, train, merge, compare."""
