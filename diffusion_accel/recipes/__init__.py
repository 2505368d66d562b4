"""Recipes: what makes a pipeline fast, written beside its model or by itself, and read again."""
