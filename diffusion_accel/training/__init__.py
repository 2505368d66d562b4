"""Training: data, latents, the shared training loop and the stages of the embedded sticker model.

Nothing heavy is imported here; import the module that is needed, for example
``from diffusion_accel.training.loop import Settings, train``.
"""
