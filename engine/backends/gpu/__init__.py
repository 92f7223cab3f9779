"""The whole loop on a GPU."""
