"""The grounding head."""
