"""What engines and number formats can serve: one row per target. Plans for a target keep to its row."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_prune.structure.axes import Axis, Structure

SPELLING = "gguf, vllm, plain, int4 or tp=N (N from 2), each once"


@dataclass(frozen=True)
class Target:
    """What a pruned model must keep to."""

    name: str
    block: int = 1
    """Input channels of every pruned matrix are multiples of this: numbers are quantised, or stored, in such blocks."""
    shards: int = 1
    """KV groups, query heads and MLP channels are multiples of this: so many devices share them."""
    uniform: frozenset[str] = frozenset()
    """Kinds of axes of which all layers lose equally many units, so that one number in the config holds the width."""
    keeps: frozenset[str] = frozenset()
    """Kinds of axes of which no unit may go."""

    @property
    def text(self) -> str:
        """One line for people."""
        parts = [
            f"pruned inputs of matrices in multiples of {self.block}" if self.block > 1 else "",
            f"heads and MLP channels divisible by {self.shards}" if self.shards > 1 else "",
            f"equal widths in all layers ({', '.join(sorted(self.uniform))})" if self.uniform else "",
            f"nothing removed of {', '.join(sorted(self.keeps))}" if self.keeps else "",
        ]
        return f"{self.name}: {'; '.join(part for part in parts if part)}"


TARGETS = (
    Target("gguf", block=32),  # Q8_0, Q4_0, Q5_0; rows that do not divide stay f16: larger than the dense model
    # vLLM's attention objects are made for every layer, its fused experts from one number
    Target("vllm", uniform=frozenset({"expert"}), keeps=frozenset({"layer_attention"})),
    Target(
        "plain",
        uniform=frozenset({"mlp", "attention", "query_heads", "expert_channels", "expert"}),
        keeps=frozenset({"layer_attention", "layer_mlp"}),
    ),
    Target("int4", block=64),  # groups of 32 (torchao) and 64 (bitsandbytes)
)


def together(names: Sequence[str]) -> Target | None:
    """One target that asks for what all of these ask for; `None` if one is unknown or named twice."""
    known = {target.name: target for target in TARGETS}
    found = []
    for name in names:
        shards = re.fullmatch(r"tp=([1-9]\d{0,3})", name)
        if name not in known and (shards is None or shards[1] == "1"):
            return None
        found.append(Target(name, shards=int(shards[1])) if shards else known[name])
    if len({name.partition("=")[0] for name in names}) < len(names):
        return None
    return Target(
        ", ".join(names),
        block=math.lcm(*(target.block for target in found)),
        shards=math.lcm(*(target.shards for target in found)),
        uniform=frozenset().union(*(target.uniform for target in found)),
        keeps=frozenset().union(*(target.keeps for target in found)),
    )


def multiple_for(target: Target, structure: Structure, axis: Axis) -> int:
    """Number that pruned widths of `axis` must be multiples of for `target`: each device's share is whole blocks."""
    if axis.kind == "layer":
        return 1
    shards = target.shards // math.gcd(target.shards, axis.num_blocks) if axis.branch is not None else 1
    one_less = {axis.name: axis.num_units - axis.num_blocks}
    multiple = shards
    for member in structure.members[axis.name] if target.block > 1 else ():
        if member.role == "consumer":
            dense, fewer = (structure.shape(member.parameter, w)[member.dim] for w in (None, one_less))
            one = dense - fewer if axis.tied else (dense - fewer) // axis.num_blocks
            multiple = math.lcm(multiple, shards * target.block // math.gcd(target.block, one))
    return multiple
