"""A GGUF file of one tensor, as small as a header with everything in it can be."""

from pathlib import Path

import gguf
import numpy as np

__all__ = ("write_tiny_gguf",)


def write_tiny_gguf(path: Path, *, width: int, pre: str = "tiny") -> Path:
    """Write a model of no use with embeddings of so many floats; `pre` names its pre-tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_basename("Tiny")
    writer.add_block_count(1)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_head_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((512, width), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
