"""Devices behind ports and addresses."""
