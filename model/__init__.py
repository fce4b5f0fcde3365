"""The transformer as nnx modules, attention, and generation. It does not know data files, meshes or training."""
