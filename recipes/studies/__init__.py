"""The laboratory, run from a clone: studies over seeds, their pages, and benchmarks."""
