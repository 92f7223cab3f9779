"""A student of few steps: it learns to go in one call where its teacher, guided, went in several."""
