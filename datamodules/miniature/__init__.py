"""Small generated data sets of images, labels and sentences, identical on every machine."""
