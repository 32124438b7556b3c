"""Parallel text: cleaning, vocabulary, token batches, and the DataModules."""
