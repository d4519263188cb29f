"""What JAX's releases, meshes and array types ask for: checks, counts, chunked sums, kinds of axes, static arguments."""
