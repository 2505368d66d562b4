"""Training of any denoiser: data, what is minimised, the loop, and its state.

Nothing heavy is imported here; import the module that is needed, for example
``from diffusion_accel.training.loop import Settings, train``.
"""
