"""Architectures in pure PyTorch that take an AttentionSpec for their attention."""
