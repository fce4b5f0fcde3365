"""Corpora, tokenizers, token shards, the order of sequences, the loader. Does not know models or training."""
