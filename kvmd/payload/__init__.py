"""Small programs as guests: their ELF files, page tables, stacks and boot information."""
