"""A golden table: twelve models as they were published, on hosts that people have.

Shapes are those of the models' `config.json`; the weights are counted at 4.5 bits (Q4_0),
norms left out, keys and values at 16 bits.
"""

from typing import NamedTuple

import pytest

from shared.model_shape import Layer, ModelShape
from shared.partition import Host
from shared.planning import SPLITTABLE, Wanted, plan

GIB = 2**30
BITS = 4.5


class Published(NamedTuple):
    architecture: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    heads_kv: int
    head_size: int
    vocabulary: int
    context: int
    tied: bool = False
    experts: int = 0
    used: int = 0
    expert_width: int = 0


MODELS = {
    "Llama-3.2-1B": Published("llama", 16, 2048, 8192, 32, 8, 64, 128_256, 131_072, tied=True),
    "Llama-3.1-8B": Published("llama", 32, 4096, 14_336, 32, 8, 128, 128_256, 131_072),
    "Llama-3.1-70B": Published("llama", 80, 8192, 28_672, 64, 8, 128, 128_256, 131_072),
    "Llama-3.1-405B": Published("llama", 126, 16_384, 53_248, 128, 8, 128, 128_256, 131_072),
    "Mistral-7B-v0.3": Published("llama", 32, 4096, 14_336, 32, 8, 128, 32_768, 32_768),
    "Mixtral-8x7B": Published(
        "llama", 32, 4096, 0, 32, 8, 128, 32_000, 32_768, False, 8, 2, 14_336
    ),
    "Qwen2.5-7B": Published("qwen2", 28, 3584, 18_944, 28, 4, 128, 152_064, 131_072),
    "Qwen2.5-72B": Published("qwen2", 80, 8192, 29_568, 64, 8, 128, 152_064, 131_072),
    "Qwen3-30B-A3B": Published(
        "qwen3moe", 48, 2048, 0, 32, 4, 128, 151_936, 40_960, False, 128, 8, 768
    ),
    "Gemma-2-27B": Published("gemma2", 46, 4608, 36_864, 32, 16, 128, 256_000, 8192, tied=True),
    "Gemma-3-27B": Published("gemma3", 62, 5376, 21_504, 32, 16, 128, 262_208, 131_072, tied=True),
    "Phi-3-medium": Published("phi3", 40, 5120, 17_920, 40, 10, 128, 32_064, 131_072),
}

HOSTS = {
    "a laptop": [Host("laptop", 12 * GIB)],
    "two desktops": [Host("one", 24 * GIB, 0.001), Host("two", 24 * GIB, 0.001)],
    "four small ones": [Host(name, 8 * GIB, 0.001 * n) for n, name in enumerate("abcd")],
    "near and far": [
        Host("near", 24 * GIB, 0.001),
        Host("next", 16 * GIB, 0.002),
        Host("town", 48 * GIB, 0.03),
        Host("abroad", 192 * GIB, 0.12),
    ],
}

GOLDEN = {
    "Llama-3.2-1B": ("1", "1", "1", "1"),
    "Llama-3.1-8B": ("1", "1", "1", "1"),
    "Llama-3.1-70B": ("-", "2", "-", "1"),
    "Llama-3.1-405B": ("-", "-", "-", "-"),
    "Mistral-7B-v0.3": ("1", "1", "1", "1"),
    "Mixtral-8x7B": ("-", "2", "4", "1"),
    "Qwen2.5-7B": ("1", "1", "1", "1"),
    "Qwen2.5-72B": ("-", "2", "-", "1"),
    "Qwen3-30B-A3B": ("-", "1", "3", "1"),
    "Gemma-2-27B": ("-", "1", "2", "1"),
    "Gemma-3-27B": ("-", "1", "3", "1"),
    "Phi-3-medium": ("1", "1", "2", "1"),
}


def shape_of(name: str) -> ModelShape:
    model = MODELS[name]
    kv_width = model.heads_kv * model.head_size
    attention = 2 * model.width * (model.heads * model.head_size + kv_width)
    dense = 3 * model.width * model.feed_forward
    experts = 3 * model.width * model.expert_width * model.experts
    gate = model.width * model.experts
    matrix = int(model.vocabulary * model.width * BITS / 8)
    layer = Layer(
        weights=int((attention + dense + experts + gate) * BITS / 8),
        kv=2 * 2 * kv_width,
        experts=int(experts * BITS / 8),
    )
    return ModelShape(
        name=name,
        architecture=model.architecture,
        layers=(layer,) * model.layers,
        embedding=matrix,
        output=0 if model.tied else matrix,
        width=model.width,
        feed_forward=model.feed_forward or model.expert_width * model.used,
        heads=model.heads,
        vocabulary=model.vocabulary,
        context=model.context,
        experts=model.experts,
        experts_used=model.used,
        period={"gemma2": 2, "gemma3": 6}.get(model.architecture, 1),
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama-3.1-8B", 8.03),
        ("Mixtral-8x7B", 46.7),
        ("Qwen3-30B-A3B", 30.5),
        ("Gemma-2-27B", 27.2),
    ],
)
def test_the_shapes_have_the_published_numbers_of_parameters(name: str, billions: float):
    assert shape_of(name).weights * 8 / BITS / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_where_it_would_run(name: str):
    """Hosts that serve it, for each set of hosts; `-`: it cannot be served there."""
    wanted = Wanted(context=4096, slots=2, least_cells=4096)
    got = []
    for hosts in HOSTS.values():
        made = plan(shape_of(name), hosts, wanted)
        got.append(str(len(made.stages)) if made.stages else "-")
        if len(made.stages) > 1:
            assert made.kind == "pipeline"
    assert tuple(got) == GOLDEN[name]


def test_the_table_tells_of_what_can_be_split():
    assert {model.architecture for model in MODELS.values()} <= SPLITTABLE


def test_who_is_too_far_is_no_partner_however_much_it_has():
    made = plan(shape_of("Llama-3.1-405B"), HOSTS["near and far"])
    assert made.kind == "refused"
    reasons = {one.host: one.reason for one in made.left_out}
    assert reasons["abroad"] == "120 ms away, more than 80 ms"
