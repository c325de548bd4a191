"""Quadrature nodes for a Gaussian integrand that changes fast around known points."""

from math import exp

import numba
import numpy as np
from numpy.typing import NDArray

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_REACH = 9.0  # standard deviations; the Gaussian mass beyond is 2e-19
_WIDEST = 1.5  # standard deviations; on it 16 nodes integrate the Gaussian itself to rounding


@numba.njit(cache=True, nogil=True)
def graded_panels(lower: float, upper: float, widest: float, centres, sizes) -> NDArray:
    """Edges of panels between `lower` and `upper`, narrow at the centres and wider away from them.

    A panel is no wider than `widest`, and no wider than `sizes[k]` plus its distance from
    `centres[k]`, for every k. `centres` ascends.
    """
    edges = [lower]
    edge, ahead, behind = lower, 0, np.inf
    while edge < upper:
        step = min(widest, behind)
        k = ahead
        while k < centres.size and centres[k] < edge + 2 * step:
            distance = centres[k] - edge
            # Reaching over the centre, or ending short of it as far away as it is wide.
            step = min(step, max(sizes[k], (sizes[k] + distance) / 2))
            k += 1
        edge = min(edge + step, upper)
        edges.append(edge)
        behind += step
        while ahead < centres.size and centres[ahead] <= edge:
            behind = min(behind, sizes[ahead] + edge - centres[ahead])
            ahead += 1
    return np.array(edges)


@numba.njit(cache=True, nogil=True)
def gaussian_rule(
    deviation: float, centres: NDArray, sizes: NDArray, even: bool = False
) -> tuple[NDArray, NDArray]:
    """Nodes and weights for averages over N(0, deviation^2), refined around `centres`.

    Parameters
    ----------
    deviation : float
        Standard deviation of the Gaussian.
    centres : ndarray, shape (K,)
        Ascending points around which the integrand changes fast.
    sizes : ndarray, shape (K,)
        Widest panel allowed at each centre: up to four times the distance, over pi, of the
        integrand's nearest complex singularity keeps the error at rounding.
    even : bool
        The integrand is even, and so are the centres: nodes on the positive half line only.

    Returns
    -------
    nodes, weights : ndarray, shape (n,)
        16 Gauss-Legendre nodes per panel, ascending; the weights hold the Gaussian density.
    """
    upper = _REACH * deviation
    lower = 0.0 if even else -upper
    seen = 0  # centres below have a twin above
    while seen < centres.size and centres[seen] < lower:
        seen += 1
    edges = graded_panels(lower, upper, _WIDEST * deviation, centres[seen:], sizes[seen:])
    nodes = np.empty((edges.size - 1, _NODES.size))
    weights = np.empty(nodes.shape)
    scale = (2.0 if even else 1.0) / (np.sqrt(2 * np.pi) * deviation)
    for panel in range(edges.size - 1):
        half = (edges[panel + 1] - edges[panel]) / 2
        for k in range(_NODES.size):
            node = edges[panel] + half + half * _NODES[k]
            nodes[panel, k] = node
            weights[panel, k] = half * _WEIGHTS[k] * scale * exp(-0.5 * (node / deviation) ** 2)
    return nodes.ravel(), weights.ravel()
