"""Recipes: one file each, get_config() -> ConfigDict. Loaded by path; imported by nobody but other recipes."""
