"""Judged answers: better and worse ones, or marked ones."""
