"""A world of emoji glyphs, and a base model trained on it."""
