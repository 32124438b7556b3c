"""The encoder-decoder Transformer, its loss and its beam search."""
