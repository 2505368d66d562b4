"""One call that makes a model fast and small: it orders what tunes, quantizes and measures, and saves the recipe."""
