"""The embedded models, as ordinary diffusers pipeline folders (package data)."""
