"""Facts by where they come from; each is gathered by one function of `verbs.diagnosing`."""
