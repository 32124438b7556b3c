"""Which samples form which batch, on which rank, in which epoch: planned, and resumed in mid-epoch."""
