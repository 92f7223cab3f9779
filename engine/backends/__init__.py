"""What runs the graphs."""
