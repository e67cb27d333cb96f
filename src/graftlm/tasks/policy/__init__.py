"""Policies that write, are rewarded and learn: rollouts, batches of them, and what is measured."""
