"""Expected hypervolume improvement, exact for independent Gaussian predictions.

All objectives are minimised here. The part of space that a front leaves undominated below the
reference point is cut into disjoint boxes; the improvement of a new point is the volume it takes
from each, and its expectation factorises over the objectives.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]


def undominated(points: Array) -> NDArray[np.bool_]:
    """Whether each point is not dominated by another; of equal points the first counts.

    Parameters
    ----------
    points : ndarray, shape (n, m)
        Smaller is better.
    """
    better = np.all(points[None] <= points[:, None], axis=-1)
    strictly = np.any(points[None] < points[:, None], axis=-1)
    earlier = np.arange(len(points))[None] < np.arange(len(points))[:, None]
    equal = np.all(points[None] == points[:, None], axis=-1)
    dominated: NDArray[np.bool_] = np.any((better & strictly) | (equal & earlier), axis=1)
    return ~dominated


def undominated_boxes(front: Array, reference: Array) -> tuple[Array, Array]:
    """Cut what a front does not dominate, below a reference point, into disjoint boxes.

    Parameters
    ----------
    front : ndarray, shape (n, m)
        Points, smaller is better; those not below the reference change nothing.
    reference : ndarray, shape (m,)

    Returns
    -------
    lower, upper : ndarray, shape (b, m)
        Corners of the boxes; lower corners may be minus infinity.

    References
    ----------
    Slicing along the last objective, as in Yang et al., Efficient computation of expected
    hypervolume improvement using box decomposition algorithms (2019), arXiv:1904.12672.
    """
    inside = front[np.all(front < reference, axis=1)] if len(front) else front.reshape(0, 0)
    if len(reference) == 1:
        top = inside.min() if len(inside) else reference[0]
        return np.array([[-np.inf]]), np.array([[top]])
    if not len(inside):
        return np.full((1, len(reference)), -np.inf), reference[None].copy()
    inside = inside[undominated(inside)]
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    edges = np.concatenate([[-np.inf], inside[:, -1], [reference[-1]]])
    lowers, uppers = [], []
    for index in range(len(edges) - 1):
        if edges[index] >= edges[index + 1]:
            continue
        low, high = undominated_boxes(inside[:index, :-1], reference[:-1])
        lowers.append(np.column_stack([low, np.full(len(low), edges[index])]))
        uppers.append(np.column_stack([high, np.full(len(high), edges[index + 1])]))
    return np.concatenate(lowers), np.concatenate(uppers)


def hypervolume(front: Array, reference: Array) -> float:
    """Volume between a front and the reference point."""
    import moocore

    inside = front[np.all(front < reference, axis=1)]
    return float(moocore.hypervolume(inside, ref=reference)) if len(inside) else 0.0


def expected_improvement(mean: Array, deviation: Array, front: Array, reference: Array) -> Array:
    """Expected growth of the hypervolume by one more point.

    Parameters
    ----------
    mean, deviation : ndarray, shape (c, m)
        Predicted objectives of each candidate, independent Gaussians.
    front : ndarray, shape (n, m)
        Objectives reached so far.
    reference : ndarray, shape (m,)

    Returns
    -------
    ndarray, shape (c,)
    """
    lower, upper = undominated_boxes(front, reference)
    gain = np.ones((len(mean), len(lower)))
    for j in range(len(reference)):
        mu, sigma = mean[:, j, None], np.maximum(deviation[:, j, None], 1e-12)
        gain *= _expected_part(mu, sigma, upper[:, j]) - _expected_part(mu, sigma, lower[:, j])
    total: Array = np.maximum(gain, 0).sum(axis=1)
    return total


def _expected_part(mean: Array, deviation: Array, level: Array) -> Array:
    """E[(level - y)+] for Gaussian y; 0 at minus infinity."""
    finite = np.where(np.isfinite(level), level, 0.0)
    z = (finite - mean) / deviation
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    value: Array = np.where(np.isfinite(level), (finite - mean) * ndtr(z) + deviation * density, 0)
    return value
