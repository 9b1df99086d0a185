"""Tiny models of many architectures with random weights, written by the gguf package."""

from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

WIDTH, HEADS, HEADS_KV, HEAD_SIZE, FEED_FORWARD, VOCABULARY = 64, 4, 2, 16, 96, 160
EXPERTS, EXPERTS_USED = 4, 2


class Tiny(NamedTuple):
    """What is particular about an architecture."""

    architecture: str
    layers: int = 6
    moe: bool = False
    biases: bool = False
    head_norms: bool = False
    after_norms: bool = False
    fused: bool = False
    window: int = 0
    tied: bool = False


TINY = {
    "llama": Tiny("llama"),
    "llama-tied": Tiny("llama", tied=True),
    "mixtral": Tiny("llama", moe=True),
    "qwen2": Tiny("qwen2", biases=True),
    "qwen3": Tiny("qwen3", head_norms=True),
    "qwen3moe": Tiny("qwen3moe", head_norms=True, moe=True),
    "gemma2": Tiny("gemma2", after_norms=True, window=8, tied=True),
    "gemma3": Tiny("gemma3", 18, head_norms=True, after_norms=True, window=8, tied=True),
    "phi3": Tiny("phi3", fused=True),
}
"""Mistral's models are of architecture `llama`, and Mixtral's are that with experts."""


def write_tiny(path: Path, tiny: Tiny, seed: int = 0, *, alike: bool = False) -> Path:
    """Write one in F32, without a vocabulary; `alike`: all experts of a layer are the same."""
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, tiny.architecture)
    writer.add_block_count(tiny.layers)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS_KV)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(0)
    if tiny.moe:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(EXPERTS_USED)
        writer.add_expert_feed_forward_length(FEED_FORWARD)
    if tiny.window:
        writer.add_sliding_window(tiny.window)
    if tiny.architecture == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)

    def matrix(name: str, *shape: int) -> None:
        data = draw.standard_normal(shape) / np.sqrt(shape[-1])
        if alike and "_exps" in name:
            data[:] = data[:1]
        writer.add_tensor(f"{name}.weight", data.astype(np.float32))

    def vector(name: str, size: int, *, suffix: str = "weight", mean: float = 1.0) -> None:
        data: Any = mean + 0.1 * draw.standard_normal(size)
        writer.add_tensor(f"{name}.{suffix}", data.astype(np.float32))

    matrix("token_embd", VOCABULARY, WIDTH)
    query, kv = HEADS * HEAD_SIZE, HEADS_KV * HEAD_SIZE
    for number in range(tiny.layers):
        at = f"blk.{number}"
        vector(f"{at}.attn_norm", WIDTH)
        vector(f"{at}.ffn_norm", WIDTH)
        if tiny.fused:
            matrix(f"{at}.attn_qkv", query + 2 * kv, WIDTH)
        else:
            for name, size in (("q", query), ("k", kv), ("v", kv)):
                matrix(f"{at}.attn_{name}", size, WIDTH)
                if tiny.biases:
                    vector(f"{at}.attn_{name}", size, suffix="bias", mean=0.0)
        matrix(f"{at}.attn_output", WIDTH, query)
        if tiny.head_norms:
            vector(f"{at}.attn_q_norm", HEAD_SIZE)
            vector(f"{at}.attn_k_norm", HEAD_SIZE)
        if tiny.after_norms:
            vector(f"{at}.post_attention_norm", WIDTH)
            vector(f"{at}.post_ffw_norm", WIDTH)
        if tiny.moe:
            matrix(f"{at}.ffn_gate_inp", EXPERTS, WIDTH)
            for name in ("gate", "up"):
                matrix(f"{at}.ffn_{name}_exps", EXPERTS, FEED_FORWARD, WIDTH)
            matrix(f"{at}.ffn_down_exps", EXPERTS, WIDTH, FEED_FORWARD)
            continue
        matrix(f"{at}.ffn_down", WIDTH, FEED_FORWARD)
        if tiny.fused:
            matrix(f"{at}.ffn_up", 2 * FEED_FORWARD, WIDTH)
        else:
            matrix(f"{at}.ffn_up", FEED_FORWARD, WIDTH)
            matrix(f"{at}.ffn_gate", FEED_FORWARD, WIDTH)
    vector("output_norm", WIDTH)
    if not tiny.tied:
        matrix("output", VOCABULARY, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
