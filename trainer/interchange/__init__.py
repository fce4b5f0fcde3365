"""Weights of other systems: reads folders of Hugging Face and .gguf files, and writes folders of Hugging Face."""
