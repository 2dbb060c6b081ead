"""megatron_ext: continue the pretraining of language models on long, uneven documents."""

__version__ = "0.1.0"
