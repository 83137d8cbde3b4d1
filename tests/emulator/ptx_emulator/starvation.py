"""Mode "starved": the seed picks a victim that runs only when nothing else can.

Everybody else, and the asynchronous units, are as early as possible. Whoever does not wait for the
victim where it should is then far ahead of it. Seeds 0 .. warps - 1 starve that warp of every CTA;
the next two the upper half and the first lane of every warp; from there on the same again in the
last CTA of each cluster only.
"""

import numpy as np

LANE_VICTIMS = 2


def victim(seed: int, threads: np.ndarray, num_warps: int, is_last_cta: bool) -> np.ndarray | None:
    """Which of a CTA's `threads` are starved, or None if none is."""
    turn, choice = divmod(seed, num_warps + LANE_VICTIMS)
    if turn % 2 and not is_last_cta:
        return None
    if choice < num_warps:
        starved = threads // 32 == choice
    elif choice == num_warps:
        starved = threads % 32 >= 16
    else:
        starved = threads % 32 == 0
    return starved if starved.any() else None
