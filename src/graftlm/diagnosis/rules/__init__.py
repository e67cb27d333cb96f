"""The rules, in files by what they look at."""
