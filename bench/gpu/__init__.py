"""What a GPU would take, by counted operations and bytes: a model, not a measurement."""
