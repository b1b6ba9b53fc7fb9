"""What training in several processes should hand over, hold and take: arithmetic, without a tensor."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes, DistributedDataParallel's defaults
TOKEN, LOSS = 8, 8  # bytes
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A language model of `train`, and a batch of all processes together, seq_len * batch tokens.

    dtype: "bf16" is autocast, with float32 weights, which fully_shard gathers in bf16.
    """

    strategy: Literal["none", "ddp", "fsdp"]
    layers: int
    hidden: int
    embed: int
    vocabulary: int
    seq_len: int
    batch: int
    dtype: Literal["bf16", "tf32", "fp32", "fp64"] = "bf16"


def shapes(case: Case) -> dict[str, list[Shape]]:
    """Of the weights of each part, in the order in which a backward pass makes their gradients."""
    H, V = case.hidden, case.vocabulary
    inputs = [H] * (case.layers - 1) + [case.embed]
    lstm: list[Shape] = [shape for width in inputs for shape in ((4 * H, width), (4 * H, H), (4 * H,), (4 * H,))]
    return {"head": [(V, H), (V,)], "lstm": lstm, "embed": [(V, case.embed)]}


def messages(case: Case, ranks: int) -> dict[str, list[int]]:
    """Bytes of every message of a step, by the kind of collective; gradients are float32, or float64."""
    parts = _bytes(case, ranks)
    every = [*itertools.chain(*parts.values())]
    if ranks == 1:
        return {"all_reduce": [], "all_gather": [], "reduce_scatter": []}
    if case.strategy == "ddp":
        return {"all_reduce": [*_buckets(every), LOSS], "all_gather": [], "reduce_scatter": []}
    norms = len(every) * _itemsize(case)
    reduced = {name: sum(of) for name, of in parts.items()}
    gathered = {name: number // (2 if case.dtype == "bf16" else 1) for name, number in reduced.items()}
    # The LSTM's weights are gathered again for the backward pass
    order = ("embed", "lstm", "head", "lstm")
    return {
        "all_reduce": [norms, LOSS],
        "all_gather": [gathered[name] for name in order],
        "reduce_scatter": [*reduced.values()],
    }


def predict(case: Case, ranks: int, *, rings: bool = True) -> dict[str, int]:
    """Of one process in one step: how often it calls each collective and the bytes of all its messages, the bytes that
    it sends, and those that it holds: of the largest shard, where they differ.

    rings: reduce-scatter is a ring, as NCCL has it; gloo's is an all-reduce.
    """
    of_kind = messages(case, ranks)
    result = {f"{kind}s": len(sizes) for kind, sizes in of_kind.items()}
    result |= {f"{kind}_bytes": sum(sizes) for kind, sizes in of_kind.items()}
    rounds = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1 if rings else 2}
    result["sent_bytes"] = sum(rounds[kind] * sum(sizes) for kind, sizes in of_kind.items()) * (ranks - 1) // ranks
    held = sum(map(sum, _bytes(case, ranks).values())) // (ranks if case.strategy == "fsdp" else 1)
    result |= {"parameter_bytes": held, "gradient_bytes": held, "moment_bytes": 2 * held}
    return result | {"saved_bytes": saved(case, ranks)}


def saved(case: Case, ranks: int) -> int:
    """Bytes that the kernels' backward pass needs of the forward pass, besides the weights."""
    rows, H, V = case.batch // ranks, case.hidden, case.vocabulary
    low, wide = {"bf16": (2, 4), "fp64": (8, 8)}.get(case.dtype, (4, 4))
    of_layer = H * (low + 4 * low + wide)  # y, the gates, c
    of_token = 2 * TOKEN + 1 + case.embed * low + case.layers * of_layer + V * wide  # with target, reset, probabilities
    states = 2 * case.layers * rows * H * low
    parts = shapes(case)
    copied = case.dtype == "bf16" and case.strategy != "fsdp"  # whose weights are gathered in bf16
    casts = low * sum(map(math.prod, [*parts["lstm"], (V, H)])) if copied else 0
    return case.seq_len * rows * of_token + states + casts + wide  # the loss


def tokens_per_s(case: Case, ranks: int, seconds: float, bandwidth: float) -> tuple[float, float]:
    """At least and at most: nothing of the communication is hidden behind computation, or as much of it as possible.

    seconds: of a step of one process with `batch // ranks` rows. bandwidth: bytes a second, out of one process.
    """
    sending = predict(case, ranks)["sent_bytes"] / bandwidth
    tokens = case.seq_len * case.batch
    return tokens / (seconds + sending), tokens / max(seconds, sending)


def _itemsize(case: Case) -> int:
    return 8 if case.dtype == "fp64" else 4


def _bytes(case: Case, ranks: int) -> dict[str, list[int]]:
    """Of the weights of each part; as shards, which are equal, they are padded with rows."""
    parts = ranks if case.strategy == "fsdp" else 1
    return {
        name: [-(-rows // parts) * parts * math.prod(others) * _itemsize(case) for rows, *others in of]
        for name, of in shapes(case).items()
    }


def _buckets(gradients: list[int]) -> list[int]:
    """Sizes of the buckets that gradients of so many bytes fill one after the other."""
    buckets, limit = [0], FIRST_BUCKET
    for number in gradients:
        if buckets[-1] >= limit:
            buckets, limit = [*buckets, 0], BUCKET
        buckets[-1] += number
    return buckets
