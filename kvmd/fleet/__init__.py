"""All machines of one daemon: each a process of its own, started, watched, found again and recorded."""
