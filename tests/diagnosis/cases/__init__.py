"""Cases by topic; each module has its own in `CASES`."""
