"""The loss in the memory of the logits: the same numbers, and never a gradient from logits that are gone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.objectives.cross_entropy import cross_entropy_sum

IGNORED = -100


def both(make_logits, labels):
    """Loss and gradients by torch and by ours, of the hidden states and the head."""
    found = []
    for loss_of in (
        lambda logits: F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum"),
        lambda logits: cross_entropy_sum(logits, labels, ignored=IGNORED),
    ):
        torch.manual_seed(0)
        hidden, head = torch.randn(len(labels), 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
        loss = loss_of(make_logits(hidden, head))
        (loss / 3).backward()
        found.append((loss.detach(), hidden.grad, head.grad))
    return found


@settings(max_examples=30)
@given(st.lists(st.sampled_from([IGNORED, *range(12)]), min_size=1, max_size=9), st.sampled_from([0.01, 1.0, 300.0]))
def test_it_is_torchs_cross_entropy(labels, scale):
    theirs, ours = both(lambda hidden, head: F.linear(hidden * scale, head), torch.tensor(labels))
    for left, right in zip(theirs, ours, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4 * scale)


def test_the_logits_memory_is_used():
    hidden, head = torch.randn(6, 8), torch.randn(12, 8, requires_grad=True)
    logits = F.linear(hidden, head)
    before = logits.detach().clone()
    cross_entropy_sum(logits, torch.arange(6), ignored=IGNORED)
    assert not torch.equal(logits, before)


@pytest.mark.parametrize(
    "make_logits",
    [
        lambda hidden, head: 5 * torch.tanh(F.linear(hidden, head) / 5),  # Gemma's: tanh keeps its output.
        lambda hidden, head: F.linear(hidden, head).exp(),
    ],
)
def test_logits_that_are_needed_are_left_alone(make_logits):
    theirs, ours = both(make_logits, torch.tensor([3, IGNORED, 11, 0]))
    for left, right in zip(theirs, ours, strict=True):
        assert torch.equal(left, right)


def test_bfloat16_logits_are_summed_in_float32():
    theirs, ours = both(lambda hidden, head: F.linear(hidden.bfloat16(), head.bfloat16()), torch.tensor([3, 1, 11]))
    for left, right in zip(theirs, ours, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(theirs[0], ours[0])


def test_a_second_backward_pass_is_refused():
    head = torch.randn(12, 8, requires_grad=True)
    loss = cross_entropy_sum(F.linear(torch.randn(4, 8), head), torch.arange(4), ignored=IGNORED)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward pass"):
        loss.backward()
