"""The loop, its checkpoints, and the recipe."""
