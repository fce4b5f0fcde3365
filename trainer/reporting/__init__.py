"""What a run prints and records: the start-up page, metrics, the progress line, FLOPs and MFU."""
