"""Operations of what torch's own flop counter misses or counts wrongly, for step.py and count_step.py."""

import math

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _convolution_backward(grad, x, weight, biases, stride, padding, dilation, transposed, out_pad, groups, mask, **_):
    """As many products for each gradient as the forward has. torch's own rule forgets the groups: of a depthwise
    convolution it makes as many times too much as there are channels.
    """
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * (mask[0] + mask[1])


# operator: rule, from the shapes of its tensors. torch counts attention on a GPU and not on a CPU.
RULES = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
