"""Low-bit quantization: quantizers, checkpoints and kernels live here. No feature of this kind is registered yet."""
