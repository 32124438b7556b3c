"""Training: checkpoints and their contents, resuming, averaging, optimization, callbacks, loggers, run directories."""
