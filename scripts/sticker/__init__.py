"""The recipe of the embedded model: its data, networks, training tasks and export."""
