"""Files broken on purpose: what reads them refuses them in one line, or reads the very same values."""
