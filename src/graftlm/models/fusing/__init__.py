"""Parts of a model that compute faster while it is trained: one file for each kind of part."""
