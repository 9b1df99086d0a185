"""Cutting a mixture-of-experts GGUF by experts: a complete, smaller model. Pure, as `stage_cut`.

Experts of a layer lie one after the other in each `*_exps` tensor, and so do their rows in the
gate's matrix: those kept are ranges of these. The gate then chooses among them alone, and the
softmax gives what the others would have had to those.
"""

import re
from collections.abc import Sequence

from worker.gguf_cut import Cut, NewTensor, Range, assemble, number
from worker.gguf_file import GgufError, GgufFile, Tensor

__all__ = ("SHARDED", "cut_shard")

SHARDED = frozenset({"llama", "qwen3moe"})
"""Architectures whose shards a test has shown: of identical experts, the text of the whole."""

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_GATE = "ffn_gate_inp.weight"


def cut_shard(
    parts: Sequence[GgufFile],
    values: bytes,
    experts: Sequence[Sequence[int]],
    *,
    identity: str = "",
) -> Cut:
    """Cut a model.

    Args:
        parts: the headers of all its files.
        values: the first file's beginning, up to the end of its values at least.
        experts: those to keep, by layer, ascending; as many in each.
        identity: see `assemble`.

    Raises:
        GgufError: it has no such experts.
    """
    first = parts[0]
    architecture = str(first.values.get("general.architecture", ""))
    if architecture not in SHARDED:
        raise GgufError(
            f"{first.name}: experts of architecture {architecture!r} have not been shown to be "
            f"divisible; those of {', '.join(sorted(SHARDED))} are"
        )
    count, layers = (
        first.values.get(f"{architecture}.{key}") for key in ("expert_count", "block_count")
    )
    used = first.values.get(f"{architecture}.expert_used_count")
    if not (isinstance(count, int) and isinstance(layers, int) and isinstance(used, int) and count):
        raise GgufError(f"{first.name}: it has no experts")
    kept = _kept(first.name, experts, count, layers)
    replaced = {
        f"{architecture}.expert_count": kept,
        f"{architecture}.expert_used_count": min(used, kept),
    }
    pairs = [
        values[pair.start : pair.stop]
        for pair in first.pairs
        if pair.key not in replaced and not pair.key.startswith("split.")
    ]
    pairs += [number(key, value) for key, value in replaced.items()]
    tensors = [
        _tensor(tensor, part, experts, count)
        for part, file in enumerate(parts)
        for tensor in file.tensors
    ]
    return assemble(parts, pairs, tensors, identity=identity)


def _kept(name: str, experts: Sequence[Sequence[int]], count: int, layers: int) -> int:
    sizes = {len(layer) for layer in experts}
    if len(experts) != layers or len(sizes) != 1 or 0 in sizes:
        raise GgufError(f"{name}: wanted as many experts of each of its {layers} layers")
    for layer, mine in enumerate(experts):
        if list(mine) != sorted(set(mine)) or mine[0] < 0 or mine[-1] >= count:
            raise GgufError(f"{name}: layer {layer} has experts 0 to {count - 1}, once each")
    return sizes.pop()


def _tensor(tensor: Tensor, part: int, experts: Sequence[Sequence[int]], count: int) -> NewTensor:
    match = _BLOCK.fullmatch(tensor.name)
    of_experts = match is not None and (
        "_exps." in tensor.name or match[2] == _GATE or match[2].startswith("exp_probs_b")
    )
    if match is None or not of_experts:
        return NewTensor.of(tensor, part)
    # The slowest dimension is that of the experts.
    if tensor.shape[-1] != count or not tensor.size:
        raise GgufError(f"tensor {tensor.name!r} has shape {[*tensor.shape]}, not {count} experts")
    mine = experts[int(match[1])]
    each = tensor.size // count
    ranges = tuple(Range(part, tensor.offset + expert * each, each) for expert in mine)
    return NewTensor(tensor.name, (*tensor.shape[:-1], len(mine)), tensor.kind, ranges)
