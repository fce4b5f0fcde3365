"""Imports and exports weights of other systems, as folders in the layout of Hugging Face and as .gguf files."""
