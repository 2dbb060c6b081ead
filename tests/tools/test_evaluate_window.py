"""tools/evaluate.py on text longer than a model was trained on."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.hf import save_hf
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from tests.train.tiny_run import VOCAB, random_documents, write_corpus
from tools.evaluate import main

CONFIG = ModelConfig(VOCAB, 32, 48, 2, 4, 2, 8, max_position=16, init_std=0.3)


def test_text_beyond_the_longest_position_is_read_through_a_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT(CONFIG, "dense")
    model.reset_parameters(0)
    save_hf(model.named_parameters(), CONFIG, tmp_path / "hf", 2**30, dtype=torch.float32)
    data = write_corpus(tmp_path / "text", random_documents(20, 60))

    def losses(*options: str) -> dict[int, tuple[float, int]]:
        command = ["--model", str(tmp_path / "hf"), "--data", data, "--position-buckets", "16", "--output", str(tmp_path / "out.json")]
        assert main([*command, *options]) == 0
        [found] = json.loads((tmp_path / "out.json").read_text())["losses"]
        return {bucket["start"]: (bucket["loss"], bucket["tokens"]) for bucket in found["by_position"]}

    assert losses().keys() == {0}, "without a window pieces end at the longest position"
    window = losses("--sequence-length", "60", "--local-tokens", "16", "--global-tokens", "2")
    assert "attention: first 2 and last 16 tokens of a document, distances up to 16" in capsys.readouterr().out
    everything = losses("--sequence-length", "60", "--local-tokens", "60")
    assert window.keys() == everything.keys() == {0, 16} and window[16][1] == everything[16][1] > 0
    assert window[0] == pytest.approx(everything[0], rel=1e-6) and abs(window[16][0] - everything[16][0]) > 1e-3

    assert main(["--model", str(tmp_path / "hf"), "--data", data, "--local-tokens", "0", "--output", str(tmp_path / "out.json")]) == 1
    assert "local_tokens: 0; accepted: at least 1" in capsys.readouterr().err
