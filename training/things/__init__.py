"""The things world: renders of textured 3D models on photographic backgrounds."""
