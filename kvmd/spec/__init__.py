"""What a machine is made of, as the operator writes it: one TOML file, and the tables in it."""
