"""How base weights are stored, read and replaced."""
