"""Words of our quantized models that their configurations, recipes and commands share."""

METHOD = "diffusion_accel"  # `quant_method` of our checkpoints
#: how layers compute, see `quant.model.set_runtime`
RUNTIMES = ("auto", "integer", "bfloat16", "dequantize", "simulated")
