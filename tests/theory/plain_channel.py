"""Slow, obvious twins of the scalar channel: the law written out, adaptive quadrature."""

import numpy as np
from scipy.special import entr
from scipy.stats import norm

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(10)


def adaptive_quadrature(integrand, edges, tolerance=1e-10):
    """Integral of `integrand`, which maps fields (n,) to values (n, m), over the panels given.

    Each panel is halved until the rule on the halves agrees with the rule on the whole, to
    `tolerance` times the integral of each component's magnitude.
    """

    def rule(low, high):
        half = (high - low) / 2
        fields = low[:, None] + half[:, None] * (1 + _NODES)
        values = integrand(fields.ravel()).reshape(*fields.shape, -1)
        return np.einsum("p,k,pkm->pm", half, _WEIGHTS, values)

    low, high = edges[:-1], edges[1:]
    whole = rule(low, high)
    scale, total = np.abs(whole).sum(axis=0), 0.0
    while low.size:
        middle = (low + high) / 2
        left, right = rule(low, middle), rule(middle, high)
        scale = np.maximum(scale, np.abs(left + right).sum(axis=0))
        rough = (np.abs(left + right - whole) > tolerance * scale).any(axis=1)
        total = total + (left + right)[~rough].sum(axis=0)
        low, high = np.append(low[rough], middle[rough]), np.append(middle[rough], high[rough])
        whole = np.append(left[rough], right[rough], axis=0)
    return total


def weight_statistics(levels, field, stiffness, ridge, temperature):
    """Mean, variance and entropy of one weight at each value of the field."""
    field = np.atleast_1d(field)[:, None]
    log_weight = -(stiffness * (levels - field) ** 2 + ridge * levels**2) / (2 * temperature)
    weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
    p = weight / weight.sum(axis=1, keepdims=True)
    mean = p @ levels
    return mean, (p * (levels - mean[:, None]) ** 2).sum(axis=1), entr(p).sum(axis=1)


def averages(codebook, stiffness, variance, ridge, temperature):
    """E[r <w>], E[<w>^2], E[var], E[var^2], E[entropy] over the field N(0, variance)."""
    deviation, curvature = np.sqrt(variance), stiffness + ridge
    reach, rows = 9 * deviation, max(2**15 // len(codebook), 1)

    def integrand(fields):
        values = []
        for r in np.split(fields, range(rows, fields.size, rows)):
            mean, var, entropy = weight_statistics(
                codebook.levels, r, stiffness, ridge, temperature
            )
            density = norm.pdf(r, scale=deviation)
            values.append(density * np.array([r * mean, mean**2, var, var**2, entropy]))
        return np.concatenate(values, axis=1).T

    # No panel may be so wide that a step of the mean hides between its nodes.
    thresholds = codebook.thresholds * curvature / stiffness
    widths = temperature / (stiffness * codebook.spacing)
    points = thresholds + np.array([-30, -5, 5, 30])[:, None] * widths
    points = np.clip(np.append(points, np.linspace(-reach, reach, 9)), -reach, reach)
    return adaptive_quadrature(integrand, np.unique(points))


def map_once(problem, susceptibility, error):
    """One pass of the replica-symmetric map and the observables there, from their definitions.

    `error` is E = rho + noise_variance - 2 m + q. Returns a dictionary with the new
    susceptibility, the order parameters and the observables, by adaptive quadrature.
    """
    alpha, rho, temperature = problem.alpha, problem.signal_variance, problem.temperature
    stiffness = alpha / (1 + susceptibility)
    variance = rho + error / alpha
    field_mean, q, var, var_squared, entropy = averages(
        problem.codebook, stiffness, variance, problem.ridge, temperature
    )
    m = rho / variance * field_mean  # E[w0 | r] = rho r / variance
    Q = q + var
    chi = var / temperature
    train = error / (1 + chi) ** 2 + temperature * chi / (1 + chi)
    energy = alpha / 2 * train + problem.ridge / 2 * Q
    entropy -= alpha / 2 * (np.log1p(chi) - chi / (1 + chi))
    return {
        "overlap": m,
        "replica_overlap": q,
        "self_overlap": Q,
        "susceptibility": chi,
        "gen_error": rho - 2 * m + Q,
        "gen_error_mean": rho - 2 * m + q,
        "train_error": train,
        "free_energy": energy - temperature * entropy,
        "entropy": entropy,
        "replicon": 1 - stiffness**2 * var_squared / (alpha * temperature**2),
    }
