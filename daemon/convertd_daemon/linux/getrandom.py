"""getrandom(2): names that nobody can guess, without the modules that `secrets` brings along."""

import os


def hex_name(length_bytes: int) -> str:
    """Give so many random bytes as hexadecimal digits, two for each."""
    return os.urandom(length_bytes).hex()
