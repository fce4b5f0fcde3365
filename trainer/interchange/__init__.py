"""Weights of other systems, in and out: folders as Hugging Face keeps them."""
