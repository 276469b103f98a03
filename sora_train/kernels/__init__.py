"""GPU kernels written in Triton, as operators of torch."""
