"""Small data sets that are generated: images, labels and sentences, the same on every machine."""
