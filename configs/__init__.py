"""Recipes: one file each, get_config() -> ConfigDict. Loaded by path; only other recipes import them."""
