"""An ASGI server on trio and h11 for Unix sockets, small enough to be read whole.

Why not one of those that exist, what it promises, and the matrix it is tested with: docs/api.md, "The server".
"""
