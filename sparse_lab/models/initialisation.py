"""What the weights of a new network start from."""

from __future__ import annotations

from torch import nn


def initialise(network: nn.Module, linear_std: float | None) -> None:
    """Draws the start weights in place, as torchvision's networks do, from torch's global generator.

    Convolutions: Kaiming normal, fan-out, gain of ReLU (std = sqrt(2 / (out * kh * kw)); He et al., ICCV 2015),
    biases 0. BatchNorm: weight 1, bias 0. Linear: normal with standard deviation `linear_std`, biases 0; None leaves
    torch's own start, uniform in +-1/sqrt(in). A network on the meta device has no values to start from.
    """
    if next(network.parameters()).is_meta:
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0.0, linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
