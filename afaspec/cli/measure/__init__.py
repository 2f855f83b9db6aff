"""Commands that measure: bench, report, sweep, what-if, suites."""
