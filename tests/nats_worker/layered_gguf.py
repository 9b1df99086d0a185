"""A GGUF file with layers of a kilobyte a row, which can be cut into parts but not computed."""

from pathlib import Path

import gguf
import numpy as np

WIDTH = 256


def write_layers(path: Path, *, layers: int, rows: int = 1024, tokens: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(tokens)])
    writer.add_tensor("token_embd.weight", np.zeros((tokens, WIDTH), dtype=np.float32))
    for number in range(layers):
        weights = np.full((rows, WIDTH), number, dtype=np.float32)
        writer.add_tensor(f"blk.{number}.attn_q.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
