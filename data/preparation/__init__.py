"""From a corpus to a dataset folder: which files, their documents, workers, shards."""
