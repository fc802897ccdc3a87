"""AWS protocols: bytes to typed values and back. Knows no operation by name."""
