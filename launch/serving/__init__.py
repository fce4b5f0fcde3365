"""The server of launch.serve: requests, the engine that owns the devices, answers, and the chat page."""
