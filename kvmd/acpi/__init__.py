"""ACPI tables: what a machine without firmware tells its guest of its devices."""
