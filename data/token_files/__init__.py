"""Tokens on disk: the dataset folder, other programs' formats, and how both are checked."""
