"""Heads: from the features of a backbone and targets to losses, or from features to results."""
