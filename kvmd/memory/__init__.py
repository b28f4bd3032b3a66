"""Guest memory: its backings, the state of its pages, and who on the host may read it."""
