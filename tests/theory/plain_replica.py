"""A slow, obvious twin of the replica-symmetric solution: a fine grid, and the damped map."""

import numpy as np


def cool(problem, temperatures, nodes=1501, steps=2000):
    """Replicon and entropy at falling temperatures, each started where the last one ended."""
    levels, alpha, rho = problem.codebook.levels, problem.alpha, problem.signal_variance
    grid = np.linspace(-9, 9, nodes)
    weight = np.exp(-(grid**2) / 2)
    weight /= weight.sum()
    chi, error, results = 0.0, rho + problem.noise_variance + np.mean(levels**2), []
    for T in temperatures:
        for _ in range(steps):
            a, tau = alpha / (1 + chi), np.sqrt(rho + error / alpha)
            r = tau * grid
            energy = a * (levels - r[:, None]) ** 2 / 2 + problem.ridge * levels**2 / 2
            p = np.exp(-(energy - energy.min(axis=1, keepdims=True)) / T)
            p /= p.sum(axis=1, keepdims=True)
            mean = p @ levels
            variance = p @ levels**2 - mean**2
            new_chi = weight @ variance / T
            m, q = rho * (weight @ (r * mean)) / tau**2, weight @ mean**2
            new_error = rho + problem.noise_variance - 2 * m + q
            done = abs(new_chi - chi) + abs(new_error - error) < 1e-9
            chi, error = (chi + new_chi) / 2, (error + new_error) / 2
            if done:
                break
        shannon = -(weight @ (p * np.log(np.maximum(p, 1e-300))).sum(axis=1))
        entropy = shannon - alpha / 2 * (np.log1p(chi) - chi / (1 + chi))
        results.append((1 - a**2 / (alpha * T**2) * (weight @ variance**2), entropy))
    return np.array(results)
