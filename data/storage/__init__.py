"""Files, object stores and their local cache, names from outside, and memory."""
