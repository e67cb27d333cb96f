"""Virtual tokens: what stands before the input of a whole stack of layers."""
