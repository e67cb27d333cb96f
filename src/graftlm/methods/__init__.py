"""Adapters: what they compute, where they go, and who owns their state."""
