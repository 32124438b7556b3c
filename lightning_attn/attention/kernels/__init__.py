"""Hand-written GPU kernels in Triton, imported only by the algorithms that use them."""
