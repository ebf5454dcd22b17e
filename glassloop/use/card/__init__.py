"""A model card written from a run, and the upload of what may be published."""
