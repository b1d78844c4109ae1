"""LoRA FT: the inputs are the answers."""

import torch

from lowra.methods.base import Observation
from lowra.methods.lora_ft import LoraFT


def test_candidates_are_the_inputs():
    stack = torch.randn(4, 6, 5)
    recovery = LoraFT().recover(Observation(stack))
    assert torch.equal(recovery.candidates, stack)
    assert recovery.status == "ok"
