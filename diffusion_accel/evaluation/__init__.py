"""Fidelity metrics and counted cost."""
