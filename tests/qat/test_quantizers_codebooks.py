"""Codebooks, fixed and learned, against plain NumPy."""

import io

import numpy as np
import pytest
import torch
from samples import images, network, normal

from qgen_lab.codebooks import Codebook, lloyd_max, lsq_grid, power_of_two, uniform
from qgen_lab.qat import (
    LSQ,
    FixedCodebook,
    bits_per_layer,
    quantize_weights,
)

# Fixed codebooks

CODEBOOKS = {
    "uniform": uniform(3, 0.3),
    "with zero": uniform(2, 0.3, include_zero=True),
    "one bit": uniform(1, 0.2),
    "power of two": power_of_two(3, 0.4),
    "lloyd": Codebook(lloyd_max(4).levels * 0.1),
    "lsq": lsq_grid(4, 0.05),
}


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_codebook_quantizes_as_it_does_outside(codebook, dtype):
    weight = normal(40, 30, dtype=dtype) * 0.2
    weight[0] = torch.as_tensor(np.resize(codebook.thresholds, 30), dtype=dtype)  # ties
    weight[1] = torch.as_tensor(np.resize(codebook.levels, 30), dtype=dtype)
    quantizer = FixedCodebook(codebook)
    weight.requires_grad_()
    value = quantizer(weight)
    array = weight.detach().numpy()
    assert torch.equal(value, torch.tensor(codebook.quantize(array)))
    assert quantizer.code(weight).tolist() == codebook.code(array).tolist()
    grad = normal(40, 30, seed=1, dtype=dtype)
    value.backward(grad)
    inner = (array > codebook.levels.astype(array.dtype)[0]) & (
        array < codebook.levels.astype(array.dtype)[-1]
    )
    if len(codebook) == 2:
        inner[:] = True
    np.testing.assert_array_equal(weight.grad.numpy(), np.where(inner, grad.numpy(), 0))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_lsq_and_its_grid_as_a_codebook_agree(bits):
    weight, grad = normal(300), normal(300, seed=1)
    lsq = LSQ(weight, bits)
    fixed = FixedCodebook(lsq_grid(bits, lsq.step_size.item()))
    found = []
    for quantizer in (lsq, fixed):
        w = weight.clone().requires_grad_()
        quantizer(w).backward(grad)
        found.append((quantizer(w).detach(), w.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_a_codebook_travels_in_the_state():
    model = quantize_weights(network(), None, CODEBOOKS["lloyd"])
    other = quantize_weights(network(seed=3), None, CODEBOOKS["uniform"])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    assert other[0].parametrizations.weight[0].codebook == CODEBOOKS["lloyd"]


def test_bits_must_match_a_codebook():
    for bits in (None, 3):
        assert bits_per_layer(quantize_weights(network(), bits, CODEBOOKS["uniform"]))["0"] == 3
    assert bits_per_layer(quantize_weights(network(), 2, CODEBOOKS["with zero"]))["0"] < 2
    with pytest.raises(ValueError, match="does not match a codebook of 8 levels"):
        quantize_weights(network(), 4, CODEBOOKS["uniform"])
    with pytest.raises(ValueError, match="per_channel"):
        quantize_weights(network(), None, CODEBOOKS["uniform"], per_channel=True)
