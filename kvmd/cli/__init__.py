"""The command line: `kvmd check`, `kvmd run`, `kvmd demo`."""
