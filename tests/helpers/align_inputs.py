"""Inputs of align_loss, and its gradients under an upstream gradient that is not 1."""

import torch


def sides(source_shape, target_shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in (source_shape, target_shape)
    )


def make(shape, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def mask(shape, device, seed=3):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4).to(device)


def run(loss, source, target, upstream=None, **options):
    """(loss, gradients of what requires one) under an upstream gradient that is not 1."""
    value = loss(source, target, **options)
    if upstream is None:
        upstream = torch.linspace(-1.5, 2.5, value.numel()).reshape(value.shape) if value.dim() else torch.tensor(-2.5)
    wanted = [x for x in (source, target) if x.requires_grad]
    return value, *torch.autograd.grad(value, wanted, upstream.to(value.device, value.dtype))


def as_double(*tensors):
    return tuple(x.detach().double().requires_grad_(x.requires_grad) for x in tensors)
