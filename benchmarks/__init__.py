"""Measurements of time and memory beside peers: `python -m benchmarks` lists and runs the cases of `registry.py`."""
