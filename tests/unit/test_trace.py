"""What tensors without data say of a pass, against counting by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sat.estimate.trace import Ledger, Segment, Trace, trace
from sat.kernels import attention as kernels
from sat.train.log import _Count

B, I, H, O = 6, 10, 14, 3  # noqa: E741 - batch, inputs, hidden, outputs
F32 = 4


def traced(dtype: torch.dtype = torch.float32) -> Trace:
    ledger = Ledger()
    with ledger.without_data():
        net = nn.Sequential(nn.Linear(I, H, dtype=dtype), nn.Tanh(), nn.Linear(H, O, dtype=dtype))

        def loss() -> Tensor:
            return net(torch.empty(B, I, dtype=dtype)).sum()

        return trace(ledger, net, loss)


def test_kept_is_what_the_backward_pass_needs() -> None:
    # The first linear keeps its input, tanh and the second linear the same output; and there is the loss.
    assert traced().kept == F32 * (B * I + B * H + 1)


def test_half_precision_keeps_half() -> None:
    assert traced(torch.bfloat16).kept == traced().kept // 2


def test_flops_are_two_for_a_weight_and_thrice_that_with_the_backward_pass() -> None:
    forward = 2 * B * (I * H + H * O)
    input_gradient = 2 * B * I * H  # the data need none
    assert traced().flops == 3 * forward - input_gradient


def test_gradients_are_finished_from_the_last_layer_to_the_first() -> None:
    done = [segment.gradients for segment in traced().segments]
    assert done[0] == 0
    assert done[2] == H * O + O
    assert done[-1] == I * H + H + H * O + O


def test_peak_weighs_activations_against_finished_gradients() -> None:
    found = Trace(0, (Segment(0, 100), Segment(50, 60)), 0)
    assert (found.peak(), found.peak(0.5), found.peak(2)) == (100, 100, 160)


def test_nothing_lives_after_a_pass() -> None:
    ledger = Ledger()
    with ledger.without_data():
        net = nn.Linear(I, O)
        before = ledger.live
        trace(ledger, net, lambda: net(torch.empty(B, I)).sum())
        assert ledger.live == before


def test_attention_by_head_has_the_flops_of_torchs_kernel() -> None:
    """Four for each pair of tokens and channel, ten on the way back: with the logits made again."""
    q, k, v = (torch.randn(2, 3, 400, 8).requires_grad_() for _ in range(3))
    pairs = 2 * 3 * 400 * 400 * 8
    for kernel in (kernels.attend, kernels.Plain(kernels.exp_attention, trains=True)):
        with _Count() as counted:
            out = kernel(q, k, v, scale=0.1)
        assert counted.flops == 4 * pairs
        with counted:
            out.sum().backward()
        assert counted.flops == 14 * pairs
