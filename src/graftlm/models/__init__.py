"""Bases: loading, generating, comparing."""
