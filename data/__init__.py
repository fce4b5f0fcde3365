"""Corpora, tokenizers, token shards, the order of sequences, the loader. It does not know models or training."""
