"""What can be done with a finished data set besides conversion."""
