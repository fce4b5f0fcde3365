"""What a person starts: the only place with flags, signals and exit codes."""
