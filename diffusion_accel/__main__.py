"""`python -m diffusion_accel` is the command `diffusion-accel`."""

from .cli.main import run

if __name__ == "__main__":
    run()
