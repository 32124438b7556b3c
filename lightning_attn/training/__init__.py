"""What makes a training go on: the checkpoint's format, what may stand in one, and whose classes it may name."""
