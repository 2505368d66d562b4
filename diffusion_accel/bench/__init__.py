"""The benchmark: any set of settings and other accelerators on one model, timed in turn, with what they kept."""
