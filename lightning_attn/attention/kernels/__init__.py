"""Hand-written GPU kernels in Triton, imported only by the algorithms that use them."""

import importlib.util

HAS_TRITON: bool = importlib.util.find_spec("triton") is not None
"""Whether kernels can be compiled for maps on CUDA."""
