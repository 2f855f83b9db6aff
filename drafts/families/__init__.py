"""Draft families: a module and its checkpoint layouts each."""
