"""Seeds for independent streams of random numbers, derived from the one that the user gives."""

import hashlib


def derive_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that depends on nothing but its arguments.

    Hashing keeps the streams apart: seed 1 at step 2 has nothing in common with seed 2 at step 1, nor the order of the
    images with their augmentation. Unlike `hash`, the value is the same in every process and Python version.

    Args:
        purpose: what the seed is for, e.g. "order".
        numbers: the user's seed, then counters.
    """
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
