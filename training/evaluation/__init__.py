"""The paper's tables, made anew on any model."""
