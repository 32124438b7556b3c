"""GPU kernels in Triton, which is optional: each is imported when the algorithm that asks for it is first used."""
