"""Scripts that make the figures of BENCHMARKS.md again; each prints the table that stands there."""
