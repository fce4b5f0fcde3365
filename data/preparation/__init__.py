"""From a corpus to a dataset folder: finds files, reads documents, encodes them in worker processes, writes shards."""
