"""Measurements of the cost of attentions and networks."""
