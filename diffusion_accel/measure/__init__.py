"""How anything here is measured: the same images again, their fidelity, times in turn."""
