import numpy as np
import pytest
import torch
from torch import nn

from qgen_lab.data import load_dataset
from qgen_lab.qat import nin, quantize_weights, vit
from qgen_lab.qat.rounding import second_moments


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.zeros(shape[0], dtype=torch.long)


def change_of_outputs(layer, weight, inputs, move):
    """Squared change of a layer's outputs over the data when its weight moves."""
    layer = layer.double()
    before = layer(inputs.double())
    with torch.no_grad():
        weight += move
    return (layer(inputs.double()) - before).square().sum().item()


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (7, 5)),
    "linear on sequences": (lambda: nn.Linear(5, 3), (7, 4, 5)),
    "3x3, stride 2": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (6, 2, 8, 8)),
    "dilated": (lambda: nn.Conv2d(2, 3, (3, 2), dilation=2), (6, 2, 8, 8)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (6, 2, 5, 7)),
    "same": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same"), (6, 2, 5, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (6, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (6, 4, 8, 8)),
    "one dimension": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (6, 2, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gives_the_change_of_the_outputs(name):
    build, shape = LAYERS[name]
    layer, data = build(), pair(*shape)
    [gram] = second_moments(nn.Sequential(layer), data).values()
    move = torch.randn(layer.weight.shape, dtype=torch.float64)
    groups = getattr(layer, "groups", 1)
    rows = move.flatten(1).reshape(groups, -1, move[0].numel())
    predicted = torch.einsum("goi,gij,goj->", rows, gram.reshape(groups, *gram.shape[-2:]), rows)
    assert gram.dtype == torch.float64
    assert predicted.item() == pytest.approx(
        change_of_outputs(layer, layer.weight, data[0], move), rel=1e-6
    )


def test_adds_up_over_batches_of_any_size_and_kind():
    data = load_dataset("digits").test
    model = nin(2, 8, in_channels=1, base_width=1, seed=0).train()
    whole = second_moments(model, data)
    parts = second_moments(model, list(data.batches(100)))
    assert model.training
    assert list(whole) == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for name, gram in whole.items():
        torch.testing.assert_close(parts[name], gram, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gram, gram.mT)


def test_attention_and_chosen_layers():
    model = vit(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16)
    found = second_moments(model, pair(3, 3, 8, 8), layers=["*in_proj", "heads.head"])
    assert {name.split(".")[-1]: tuple(gram.shape) for name, gram in found.items()} == {
        "in_proj": (8, 8),
        "head": (8, 8),
    }


@pytest.mark.parametrize("grad", [False, True], ids=["fast path", "slow path"])
def test_output_projection_of_attention(grad):
    """Its input, the heads side by side, is never handed to the layer by torch itself."""
    attention = nn.MultiheadAttention(6, 2, batch_first=True).eval().requires_grad_(grad)
    model = Wrapped(attention)
    x = torch.randn(5, 4, 6)
    expected = model(x)
    q, k, v = (x @ attention.in_proj_weight.T).detach().view(5, 4, 3, 2, 3).permute(2, 0, 3, 1, 4)
    heads = (q @ k.mT / 3**0.5).softmax(-1) @ v
    rows = heads.transpose(1, 2).reshape(20, 6)
    found = second_moments(model, (x, torch.zeros(5)), "attention.out_proj")
    torch.testing.assert_close(found["attention.out_proj"].float(), rows.T @ rows)
    assert torch.equal(model(x), expected)
    assert "forward" not in vars(attention)


class Wrapped(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_of_a_quantized_network_are_those_of_its_quantized_weights():
    data = pair(20, 1, 8, 8)
    plain, quantized = (nin(1, 4, in_channels=1, base_width=1, seed=0) for _ in range(2))
    quantize_weights(quantized, 2, layers="0")
    after_first = [second_moments(model, data)["3"] for model in (plain, quantized)]
    assert not np.allclose(*after_first)


def test_bad_input():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="layers='x' matches no layer"):
        second_moments(model, pair(4, 3), layers="x")
    with pytest.raises(ValueError, match="no data reach the layers 0"):
        second_moments(model, [])
    with pytest.raises(ValueError, match="layer '0' gets inputs that are not finite"):
        second_moments(model, (torch.full((2, 3), torch.nan), torch.zeros(2)))
    with pytest.raises(ValueError, match="more than memory=10 bytes"):
        second_moments(model, pair(4, 3), memory=10)
    unused = nn.Sequential(nn.Linear(3, 2))
    unused.spare = nn.Linear(3, 2)
    unused.forward = lambda x: unused[0](x)
    with pytest.raises(ValueError, match="no data reach the layers spare"):
        second_moments(unused, pair(4, 3))
    with pytest.raises(TypeError, match="layer '0' is a ConvTranspose2d"):
        second_moments(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), pair(1, 2, 8, 8))
