"""Network architectures in pure PyTorch, whose attention an `AttentionSpec` describes."""
