"""Seeds of everything random in a run, each derived from the run's seed, a purpose and a count.

Nothing carries random state from one step to the next, so a run that is resumed at any step draws
what the uninterrupted run would have drawn.
"""

import hashlib


def derive(seed: int, purpose: str, count: int = 0) -> int:
    """Seed of one random choice of a run.

    Parameters
    ----------
    seed : int
        Seed of the run.
    purpose : str
        What is drawn: `weights`, `order`, `dropout`, `negatives` and so on.
    count : int
        Number of the step or epoch.

    Returns
    -------
    int
        At least 0 and below 2**63; equal arguments give equal seeds on any machine.
    """
    digest = hashlib.blake2b(f"{seed}:{purpose}:{count}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
