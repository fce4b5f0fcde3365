"""Recipes: each file has get_config() -> ConfigDict. Recipes are loaded by path; only other recipes import them."""
