"""`python -m diffusion_accel` is the command `diffusion-accel`."""

from .cli.main import main

if __name__ == "__main__":
    main()
