"""Mean LoRA: one candidate, the mean of the merged weights."""

import torch

from lowra.methods.base import Observation
from lowra.methods.mean_lora import MeanLora


def test_the_candidate_is_the_mean():
    stack = torch.randn(4, 6, 5)
    recovery = MeanLora().recover(Observation(stack))
    assert recovery.candidates.shape == (1, 6, 5)
    # The sum of 4 float32 numbers of size 1 rounds at 2^-24 of their sum.
    torch.testing.assert_close(recovery.candidates[0], sum(stack) / 4, rtol=0, atol=1e-6)
