"""One machine as a process of its own: its control socket, its files, and the parent that forks it."""
