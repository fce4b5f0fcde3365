"""Mesh, sharding, state, step, optimizer, checkpoints, metrics, and the loop that joins them."""
