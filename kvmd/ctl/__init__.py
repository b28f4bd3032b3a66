"""``kvmctl``: the command line client of the control API.

It shares no code with the daemon but words and pictures, so that a command costs little: see docs/kvmctl.md.
"""
