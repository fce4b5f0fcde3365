"""Checkpoints, the run directory, agreement between processes, and what is done when something fails."""
