"""Seeds for streams of noise that do not depend on what was drawn before."""

import numpy as np

ASIDE = 2**31
"""A stream that no block of data has."""


def key(seed: int, number: int) -> int:
    """The seed of stream `number` under `seed`."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)
