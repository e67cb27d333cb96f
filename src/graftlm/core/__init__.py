"""Errors, configuration, files, events, seeding: nothing of ours below, no torch at import."""
