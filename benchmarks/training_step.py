"""CPU time of a training step with 4-bit weights, as a multiple of the full-precision step.

A step is forward, cross entropy, backward and SGD (momentum 0.9, weight decay 5e-4), with all
convolutions and linear layers at 4 bits, weights only. All variants live in one process with one
thread. Each round steps each of them, the order rotated, one untimed step before each timed one.
A ratio is the median over the rounds of a variant's CPU time over that of full precision in the
same round. Peers have LSQ's arithmetic; so have our quantizers down to the fixed width.

    python benchmarks/training_step.py [--rounds N]

Brevitas counts where it is installed. It asks for an older setuptools than the book's: give it an
environment of its own, `pip install . brevitas`.
"""

import argparse
import copy
import importlib.util
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from qgen_lab._torchvision import torchvision
from qgen_lab.qat import LSQ, FixedWidth, nin, parameter_groups, quantize_weights

BITS = 4
LOW, HIGH = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
LAYERS = (nn.Conv2d, nn.Linear)
OURS = {
    "LSQ": "lsq",
    "LSQ, a step per channel": lambda weight, bits, _: LSQ(weight, bits, channel_dim=0),
    "LSQ, two blocks of channels": partial(LSQ, groups=2),
    "fixed width": FixedWidth(0.05),
    "fixed relative width": FixedWidth(2.0, relative=True),
    "power of two": "power-of-two",
    "Lloyd-Max": "lloyd-max",
    "noise": "noise",
}
HAS_BREVITAS = importlib.util.find_spec("brevitas") is not None


class PlainLSQ(torch.autograd.Function):
    """LSQ as one writes it down: ordinary tensor operations, the mask saved."""

    @staticmethod
    def forward(ctx, weight, step, scale):
        """Return `step round(clip(weight / step))`."""
        v = weight / step
        inside = (v > LOW) & (v < HIGH)
        codes = v.clamp(LOW, HIGH).round()
        ctx.save_for_backward(inside, torch.where(inside, codes - v, codes))
        ctx.scale = scale
        return codes * step

    @staticmethod
    def backward(ctx, grad):
        """Mask the gradient to the weights, sum the one to the step."""
        inside, slope = ctx.saved_tensors
        return grad * inside, ctx.scale * (grad * slope).sum().view(1), None


class StepParametrization(nn.Module):
    """A parametrization with LSQ's step, for the two peers that are functions."""

    def __init__(self, weight: Tensor, function: Callable):
        super().__init__()
        self.step = nn.Parameter((2 * weight.detach().abs().mean() / HIGH**0.5).reshape(1))
        self.scale = (weight.numel() * HIGH) ** -0.5
        self.function = function

    def forward(self, weight):
        """Apply the function."""
        return self.function(weight, self.step, self.scale)


def torch_operator(weight: Tensor, step: Tensor, scale: float) -> Tensor:
    """PyTorch's own learnable fake quantization."""
    zero_point = torch.zeros(1)
    return torch._fake_quantize_learnable_per_tensor_affine(
        weight, step, zero_point, LOW, HIGH, scale
    )


def with_function(model: nn.Module, function: Callable) -> nn.Module:
    for layer in quantized_layers(model):
        parametrization = StepParametrization(layer.weight, function)
        parametrize.register_parametrization(layer, "weight", parametrization)
    return model


def with_brevitas(model: nn.Module) -> nn.Module:
    """Swap in Brevitas's layers: 4 bits, signed, per tensor, learned step started from the data."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerTensorFloat

    class Learned(Int8WeightPerTensorFloat):
        bit_width = BITS
        narrow_range = False
        scaling_impl_type = "parameter_from_stats"

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, LAYERS):
                continue
            bias = layer.bias is not None
            if isinstance(layer, nn.Linear):
                sizes = layer.in_features, layer.out_features
                twin = qnn.QuantLinear(*sizes, bias=bias, weight_quant=Learned)
            else:
                sizes = layer.in_channels, layer.out_channels, layer.kernel_size
                twin = qnn.QuantConv2d(
                    *sizes, layer.stride, layer.padding, bias=bias, weight_quant=Learned
                )
            twin.load_state_dict(layer.state_dict(), strict=False)
            setattr(parent, name, twin)
    return model


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, LAYERS)]


@dataclass
class Variant:
    """A model that trains on one batch, and what its steps have cost."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    memory_format: torch.memory_format = torch.contiguous_format
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.model.to(memory_format=self.memory_format)
        inputs, targets = self.batch
        self.batch = inputs.contiguous(memory_format=self.memory_format), targets
        groups = parameter_groups(self.model, weight_decay=5e-4)
        self.optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
        self.gradients = [torch.randn_like(w) for w in self.quantized_weights()]

    def quantized_weights(self) -> list[Tensor]:
        """Weights as the layers use them, each computed anew."""
        layers = quantized_layers(self.model)
        if hasattr(layers[0], "weight_quant"):  # Brevitas
            return [layer.quant_weight().value for layer in layers]
        return [layer.weight for layer in layers]

    def step(self) -> None:
        """Train one step."""
        inputs, targets = self.batch
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), targets).backward()
        self.optimizer.step()

    def quantizer_alone(self) -> float:
        """CPU seconds of the quantizers of all layers, forward and backward."""
        start = time.process_time()
        torch.autograd.backward(self.quantized_weights(), self.gradients)
        elapsed = time.process_time() - start
        self.optimizer.zero_grad()
        return elapsed


def variants(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Variant]:
    """Equal models, differently quantized."""

    def start() -> nn.Module:
        return copy.deepcopy(model)

    found = {
        "full precision": Variant(start(), batch),
        **{
            name: Variant(quantize_weights(start(), BITS, quantizer), batch)
            for name, quantizer in OURS.items()
        },
        "plain autograd function": Variant(with_function(start(), PlainLSQ.apply), batch),
        "torch's learnable operator": Variant(with_function(start(), torch_operator), batch),
        "full precision, channels last": Variant(start(), batch, torch.channels_last),
        "LSQ, channels last": Variant(quantize_weights(start(), BITS), batch, torch.channels_last),
    }
    if HAS_BREVITAS:
        found["Brevitas"] = Variant(with_brevitas(start()), batch)
    return found


def measure(candidates: dict[str, Variant], rounds: int) -> pd.DataFrame:
    """Median milliseconds and ratio of a step, and milliseconds of the quantizer alone."""
    order = list(candidates.values())
    for _ in tqdm(range(rounds), disable=None):
        for variant in order:
            variant.step()
            start = time.process_time()
            variant.step()
            variant.seconds.append(time.process_time() - start)
        order = order[1:] + order[:1]
    reference = np.array(candidates["full precision"].seconds)
    rows = {}
    for name, variant in candidates.items():
        alone = np.median([variant.quantizer_alone() for _ in range(7)][2:])
        rows[name] = {
            "step, ms": 1e3 * np.median(variant.seconds),
            "ratio": np.median(np.array(variant.seconds) / reference),
            "quantizer alone, ms": np.nan if name.startswith("full") else 1e3 * alone,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def floor(weights: int) -> tuple[float, float]:
    """Megabytes that a quantizer must move, and milliseconds to copy as much.

    Forward reads the weights and writes the quantized ones; backward reads weights and gradient and
    writes the masked gradient: five float32 numbers a weight.
    """
    source = torch.ones(weights)
    target = torch.empty_like(source)
    times = []
    for _ in range(30):
        start = time.process_time()
        target.copy_(source)
        times.append(time.process_time() - start)
    return 20e-6 * weights, 1e3 * np.median(times) * 5 / 2


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} logical cores, 1 thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    brevitas = importlib.metadata.version("brevitas") if HAS_BREVITAS else "not installed, left out"
    print(f"Python {platform.python_version()}, torch {torch.__version__}, Brevitas: {brevitas}")
    print(machine())

    tasks = {
        "NiN, depth 3, 64 channels, batch 128": (nin(3, 64, base_width=1), 128),
        "ResNet-18, batch 64": (torchvision.models.resnet18(num_classes=10), 64),
    }
    for title, (model, size) in tasks.items():
        batch = torch.randn(size, 3, 32, 32), torch.randint(10, (size,))
        table = measure(variants(model, batch), rounds)
        weights = sum(layer.weight.numel() for layer in quantized_layers(model))
        megabytes, milliseconds = floor(weights)
        print(f"\n{title}, 3x32x32, {rounds} rounds\n{table.round(3).to_string(na_rep='-')}")
        print(
            f"floor: {megabytes:.1f} MB in and out of memory, {milliseconds:.2f} ms at the speed of"
            f" a copy; our LSQ takes {table.at['LSQ', 'quantizer alone, ms']:.2f} ms"
        )


if __name__ == "__main__":
    main()
