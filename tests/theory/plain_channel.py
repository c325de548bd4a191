"""Slow, obvious twins of the scalar channel: the law written out, adaptive quadrature."""

from itertools import pairwise

import numpy as np
from scipy.integrate import quad_vec
from scipy.stats import norm


def weight_statistics(levels, field, stiffness, ridge, temperature):
    """Mean, variance and entropy of one weight at one value of the field."""
    log_weight = -(stiffness * (levels - field) ** 2 + ridge * levels**2) / (2 * temperature)
    weight = np.exp(log_weight - log_weight.max())
    p = weight / weight.sum()
    mean = p @ levels
    return mean, p @ (levels - mean) ** 2, -(p[p > 0] @ np.log(p[p > 0]))


def averages(codebook, stiffness, variance, ridge, temperature):
    """E[r <w>], E[<w>^2], E[var], E[var^2], E[entropy] over the field N(0, variance)."""
    deviation, curvature = np.sqrt(variance), stiffness + ridge
    reach = 9 * deviation

    def integrand(r):
        mean, var, entropy = weight_statistics(codebook.levels, r, stiffness, ridge, temperature)
        return norm.pdf(r, scale=deviation) * np.array([r * mean, mean**2, var, var**2, entropy])

    thresholds = codebook.thresholds * curvature / stiffness
    widths = temperature / (stiffness * codebook.spacing)
    points = [t + k * w for t, w in zip(thresholds, widths, strict=True) for k in (-30, -5, 5, 30)]
    points = np.unique(np.clip(np.append(points, [-reach, reach]), -reach, reach))
    result = np.zeros(5)
    for low, high in pairwise(points):
        result += quad_vec(integrand, low, high, epsabs=1e-13, epsrel=1e-10, norm="max")[0]
    return result


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
