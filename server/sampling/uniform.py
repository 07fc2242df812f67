"""Uniform random numbers that depend on nothing but (seed, position).

So a request's text does not change with its batch neighbours, its draft trees or a preemption.
"""

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits.

    Args:
        seed: Any integer; its lowest 64 bits count.
        position: Index in the sequence of the token that is drawn with it.
    """
    # NOTE: seed and position must not be interchangeable: (3, 7) and (7, 3) are different draws.
    return (_mix(_mix(seed & _MASK) + _GAMMA * position) >> 11) * 2.0**-53
