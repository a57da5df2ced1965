"""A tiny random Llama in a GGUF file, as llama.cpp's converter lays it out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TEMPLATE

LAYERS, HEADS, KEY_HEADS, WIDTH, INNER = 2, 4, 2, 32, 64
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # kinds of tokens


def vocabulary() -> list[str]:
    """Special tokens, the 256 bytes as byte-level BPE writes them, and one merged pair."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġw"]


def write_gguf_host(path: Path, weights: str = "Q8_0", seed: int = 0, without: str | None = None) -> Path:
    """Write the file.

    Args:
        path: where.
        weights: how matrices are stored: F32, F16, or a kind of blocks of 32 numbers like Q8_0 or Q4_0.
        seed: of the weights.
        without: a tensor that is left out, by its name in the file.
    """
    import gguf

    words = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([_CONTROL] * 3 + [_UNKNOWN] + [_NORMAL] * (len(words) - 4))
    writer.add_token_merges(["Ġ w"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    writer.add_chat_template(TEMPLATE)
    kind = gguf.GGMLQuantizationType[weights]
    for name, values in _tensors(len(words), seed).items():
        if name != without:
            own = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(words: int, seed: int) -> dict[str, Any]:
    """Weights by their names in the file, (out, in); rows of q and k in whatever order: they are random."""
    key_width = WIDTH // HEADS * KEY_HEADS
    shapes = {"token_embd": (words, WIDTH), "output": (words, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        own = {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH), "attn_k": (key_width, WIDTH), "attn_v": (key_width, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    torch.manual_seed(seed)
    random = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    return {name: np.asarray(1 + 0.1 * w if w.ndim == 1 else 0.1 * w) for name, w in random.items()}


def dequantised(path: Path, folder: Path) -> Path:
    """The same model as safetensors in float32, by transformers alone: an oracle's host."""
    import transformers

    options = {"gguf_file": str(path)}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(folder)
    return folder
