"""raydistil: distil a transformer."""
