"""`graft search`: many trials on one loaded base."""
