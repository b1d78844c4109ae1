"""Where a layer stands in its network, read off its checkpoint name: its type and its depth."""

from __future__ import annotations

import re
from collections.abc import Sequence

# The container that repeats in each family: transformer layers, and the attention blocks of a UNet.
_BLOCK = re.compile(
    r"^(?P<block>(?:.*\.)?(?:down_blocks\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+|up_blocks\.\d+\.attentions\.\d+"
    r"|layers?\.\d+|h\.\d+|blocks\.\d+))\.(?P<rest>.+)$"
)
_UNET_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


def _split(name: str) -> tuple[str, str]:
    bare = name.removesuffix(".weight")
    match = _BLOCK.match(bare)
    return (match["block"], match["rest"]) if match else ("", bare)


def layer_type(name: str) -> str:
    """What kind of layer it is, the same at every depth: `self_attn.q_proj`, `attn1.to_out.0`, `proj_in`.

    >>> layer_type("vit.encoder.layer.3.attention.attention.query.weight")
    'attention.attention.query'
    """
    return re.sub(r"^transformer_blocks\.\d+\.", "", _split(name)[1])


def depths(labels: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    """The depth of each (component, name): its block's ordinal among the component's blocks, counted from 0."""

    def order(block: str) -> tuple[int | str, ...]:
        parts = re.split(r"\.", block)
        return tuple(_UNET_ORDER.get(p, int(p) if p.isdigit() else -1) for p in parts)

    blocks: dict[str, list[str]] = {}
    for component, name in labels:
        blocks.setdefault(component, []).append(_split(name)[0])
    ranks = {
        component: {block: i for i, block in enumerate(sorted(set(found), key=order))}
        for component, found in blocks.items()
    }
    return tuple(ranks[component][_split(name)[0]] for component, name in labels)
