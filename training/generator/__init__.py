"""Images from a frozen base model."""
