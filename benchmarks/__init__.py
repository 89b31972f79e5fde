"""Measurements beside the peers, one module each: `python -m benchmarks.NAME`."""
