"""Latent transparency of the embedded model: the pair of networks, its training tasks, and the update of the UNet."""
