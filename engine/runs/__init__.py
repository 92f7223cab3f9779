"""A whole run: planned, shared, made, watched."""
