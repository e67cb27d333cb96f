"""Several adapters made one."""
