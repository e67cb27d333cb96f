"""Evidence of a run or of an adapter, gathered for the rules of `graftlm.diagnosis`."""
