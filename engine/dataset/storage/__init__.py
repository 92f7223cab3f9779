"""Where files go: a folder or an object store."""
