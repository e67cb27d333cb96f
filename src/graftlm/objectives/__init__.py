"""Losses: batch in, sum and count out."""
