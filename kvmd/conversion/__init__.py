"""The rules of conversion, as plain classes without I/O."""
