"""The trainers that are compared: one file for each library."""
