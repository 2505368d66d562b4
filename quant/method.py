"""`quant_method` of our checkpoints."""

METHOD = "diffusion_accel"
