"""Files of models: which model is meant, and whether its files are what they should be."""
