"""The control API on a Unix socket: filled by the daemon."""
