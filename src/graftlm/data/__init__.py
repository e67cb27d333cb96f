"""Data: read, recognise, render, encode, split, batch and check."""
