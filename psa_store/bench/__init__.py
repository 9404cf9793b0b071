"""Benchmarks. Each is a program that prints what it compares, both figures, the ratio and the spread."""
