"""getrandom(2): unguessable names, without the modules that `secrets` imports."""

import os


def hex_name(length_bytes: int) -> str:
    """Return random bytes as hexadecimal digits, two for each byte."""
    return os.urandom(length_bytes).hex()
