"""Search over settings: spaces, budgets, stopping, fronts. Runs are given as callables."""
