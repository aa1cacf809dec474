"""How a prompt is read: the host's chain of launches for a chunk of it."""
