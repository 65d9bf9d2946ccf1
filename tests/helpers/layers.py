"""A random layer to solve."""

import torch


def layer(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W (out, in) and H (in, in), with a row without weights, an outlier and an unused input."""
    generator = torch.Generator().manual_seed(outputs)
    x = torch.randn(2 * inputs, inputs, generator=generator)
    x = x @ (torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) / inputs**0.5)
    W = torch.randn(outputs, inputs, generator=generator) * torch.linspace(0.1, 3, inputs)
    W[0] = 0  # a row without weights
    W[1, 3] = 1000  # an outlier
    x[:, 5] = 0  # an input that never fires
    return W, x.T @ x / len(x)
