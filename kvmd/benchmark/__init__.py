"""Benchmarks: ratios of two things that took turns in one run (``kvmd bench``). None is a timed test."""
