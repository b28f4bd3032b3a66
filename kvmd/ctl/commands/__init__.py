"""The subcommands: each is the click command of its name in the module of its name."""
