"""Where the factors of a LoRA begin."""
