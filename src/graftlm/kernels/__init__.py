"""Operators: declared once, with a plain reference for each."""
