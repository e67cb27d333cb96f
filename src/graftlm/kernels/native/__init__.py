"""Compiled code for CPUs: the C source, and how it is called."""
