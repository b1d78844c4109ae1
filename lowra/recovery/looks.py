"""What a change of full rank looks like, from two fine-tuned models alone: kinds other than LoRA leave their own marks.

Those of which the base can be recovered, (IA)^3, DoRA and LoKr, are recovered; a rotation leaves its mark and no way
back.
"""

from __future__ import annotations

from torch import Tensor

# A relation holds when what it leaves unexplained is below this share of the difference it explains.
HOLDS = 0.02

# Columns of the Gram matrices that are compared.
COLUMNS = 64


def looks_like(first: Tensor, second: Tensor) -> str:
    """A name for how two weights (d, k) differ, when they differ by a full rank; "" where none fits.

    Equal Gram matrices are those of weights that differ by a rotation, as OFT and its kin train them (Qiu et al. 2023):
    a relation that holds whatever the training was, and by chance never.
    """
    a, b = first.double(), second.double()
    for x, y, side in ((a, b, "left"), (a.mT, b.mT, "right")):
        few = slice(0, COLUMNS)
        before, after = x.mT[few] @ x, y.mT[few] @ y  # (columns, k): parts of the Gram matrices
        scale = float(((y - x).mT[few] @ x).norm())
        if scale and float((after - before).norm()) < HOLDS * scale:
            return f"like OFT or BOFT: a rotation from the {side}, which leaves the Gram matrix alone"
    return ""
