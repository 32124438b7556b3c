"""Measurements of whole networks."""
