"""Corpora, tokenizers, token shards, the order of samples, the loader. Knows nothing of models or training."""
