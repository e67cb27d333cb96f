"""Texts with labels, numbers or tags: columns, records, values, rows of tokens."""
