"""Benchmarks for developers. Each prints its figure beside a reference; none is collected by pytest."""
