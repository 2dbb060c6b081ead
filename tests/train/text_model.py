"""A small Llama with random weights that transformers wrote, with a tokenizer and text beside it."""

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.data.byte_level import byte_level_backend

TEXTS = [f"line {number}: the quick brown fox jumps over {number * 7} lazy dogs, again and again" for number in range(12)]
MOST = 96
"""Tokens that the model takes."""


def save_text_model(directory: Path) -> Path:
    """Write it into ``directory``, whose text.jsonl has ``TEXTS``; returns the directory."""
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=MOST, initializer_range=0.3, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(directory)
    backend = byte_level_backend(pre_tokenizers.ByteLevel(add_prefix_space=False), TEXTS)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(directory)
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return directory
