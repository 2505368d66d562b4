"""Making quantized checkpoints, offline: the stages, each on its own, and all of them in order."""
