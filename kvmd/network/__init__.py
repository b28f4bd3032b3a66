"""Guests' networks: taps, the bridges that they are ports of, and network namespaces. docs/network.md says how."""
