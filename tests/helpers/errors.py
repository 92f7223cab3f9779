"""How far numbers are from those expected."""

import numpy as np


def relative_l2(actual, expected) -> float:
    """Norm of the difference over the norm of what is expected, in float64; arrays or tensors, also one of each."""
    plain = (value.detach() if hasattr(value, "detach") else value for value in (actual, expected))
    actual, expected = (np.asarray(value).astype(np.float64) for value in plain)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))
