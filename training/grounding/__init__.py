"""Training the grounding head."""
