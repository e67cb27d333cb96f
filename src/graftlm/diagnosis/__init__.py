"""Known failures of adapters: named, with evidence, and with the command that fixes them."""
