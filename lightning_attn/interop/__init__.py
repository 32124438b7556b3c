"""Import paths for weights of other projects; the code is in `lightning_attn.networks.weights`."""
