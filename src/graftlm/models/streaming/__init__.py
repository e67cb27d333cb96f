"""A base whose layers lie elsewhere while no pass needs them."""
