"""The transformer as nnx modules, attention, and generation. Knows nothing of data files, meshes or training."""
