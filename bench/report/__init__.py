"""A run's report: its schema, its figures, and how it is shown."""
