"""Benchmarks: ratios of two things measured in turn in one run (``python -m bench``). None is a timed test."""
