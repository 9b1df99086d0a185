"""What a model weighs, layer by layer: all that is to be known for placing it. Pure arithmetic.

llama.cpp needs three things of a host's memory: the weights, the keys and values of every cell
(one token of one sequence), and buffers for the widest step. A part of a model, some of its layers
in a row, needs its share of each. The part that has the `head` also embeds tokens and computes
logits; it holds the embedding and the output matrix, which in many models are one.
"""

from itertools import accumulate

import msgspec

__all__ = ("GRAIN", "Layer", "ModelShape", "Scales", "Size")

GRAIN = 256
"""llama.cpp rounds the cells of a sequence up to a multiple of this (`llama_context`, GGML_PAD)."""


class Layer(msgspec.Struct, frozen=True, array_like=True):
    """One layer's bytes."""

    weights: int
    kv: int
    """A token, keys and values together."""
    experts: int = 0
    """Of the weights, those of experts, of which a shard keeps some."""


class ModelShape(msgspec.Struct, frozen=True):
    """A model without its numbers."""

    name: str
    architecture: str
    layers: tuple[Layer, ...]
    embedding: int
    """Bytes of the embedding matrix."""
    output: int
    """Bytes of output norm and output matrix; of the norm alone where the embedding is both."""
    width: int
    """Numbers in an activation."""
    feed_forward: int
    heads: int
    vocabulary: int
    context: int
    """Tokens it was trained for; 0: not said."""
    experts: int = 0
    experts_used: int = 0
    shared: int = 0
    """Bytes that every part needs, as tables for the rotation of positions."""
    period: int = 1
    """It may be cut before layers whose number is a multiple of this: kinds of layers repeat so."""

    @property
    def weights(self) -> int:
        """Bytes of all tensors."""
        return (
            sum(layer.weights for layer in self.layers) + self.embedding + self.output + self.shared
        )


class Size(msgspec.Struct, frozen=True):
    """How much a part is to hold at once."""

    cells: int
    """Tokens of all sequences together whose keys and values are kept."""
    step: int = 512
    """Rows of the widest step."""


class Scales:
    """Weighs parts of one model at one size."""

    def __init__(self, shape: ModelShape, size: Size) -> None:
        self.shape = shape
        self.size = size
        self._weights = (0, *accumulate(layer.weights for layer in shape.layers))
        self._kv = (0, *accumulate(layer.kv for layer in shape.layers))
        unused = 1 - shape.experts_used / shape.experts if shape.experts else 0.0
        self._work = (0.0, *accumulate(one.weights - unused * one.experts for one in shape.layers))
        step = min(size.step, max(1, size.cells))
        cells = min(size.cells, shape.context or size.cells)
        scores = shape.heads * cells * step * 4
        # Attention scores or logits, whichever is more: llama.cpp uses the room for one after the
        # other. Beside them the activations of one layer.
        activations = step * 4 * (8 * shape.width + 3 * shape.feed_forward)
        self._buffers = scores + activations
        self._head_buffers = max(scores, shape.vocabulary * step * 4) + activations

    def weights(self, start: int, stop: int, *, head: bool) -> int:
        """Bytes of the weights of the layers from `start` to before `stop`."""
        ends = self.shape.embedding + self.shape.output if head else 0
        return self._weights[stop] - self._weights[start] + ends + self.shape.shared

    def memory(self, start: int, stop: int, *, head: bool) -> int:
        """Bytes such a part takes of its host."""
        return (
            self.weights(start, stop, head=head)
            + self.size.cells * (self._kv[stop] - self._kv[start])
            + (self._head_buffers if head else self._buffers)
        )

    def work(self, start: int, stop: int, *, head: bool) -> float:
        """Bytes that are read for one token: what decoding takes its time for.

        Of experts those that are used; of the head the output matrix, which may be the embedding.
        """
        ends = max(self.shape.output, self.shape.embedding) if head else 0
        return self._work[stop] - self._work[start] + ends

    @property
    def whole(self) -> int:
        """Bytes of the whole model on one host."""
        return self.memory(0, len(self.shape.layers), head=True)
