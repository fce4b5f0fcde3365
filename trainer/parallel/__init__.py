"""The model on a mesh: what each device holds, which collectives run, and which kernel computes attention."""
