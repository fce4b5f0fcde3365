"""From a corpus to a dataset folder: its files, their documents, workers, shards."""
