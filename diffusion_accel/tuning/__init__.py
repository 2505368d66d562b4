"""The tuner: plans for `Reuse` that are searched for and fitted, offline."""
