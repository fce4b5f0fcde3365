"""Files, object stores and their local cache, external names, and memory."""
