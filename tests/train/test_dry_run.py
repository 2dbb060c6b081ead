"""What a run says about itself before it starts, with all of its files and with few."""

import json
from pathlib import Path

import pytest

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.train import dry_run
from tests.train.tiny_run import write_run


def test_with_all_files_it_tells_the_sources(tmp_path: Path) -> None:
    text = dry_run(load_config(write_run(tmp_path)))
    assert "token budget     2,048 at most" in text and "prose: 66.7% of the tokens" in text and "not there yet" not in text


def test_without_data_it_names_what_is_missing_and_tells_the_rest(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path))
    whole = dry_run(config)
    (tmp_path / "code.idx").unlink()
    told, missing = dry_run(config).split("not there yet\n")
    assert missing.split() == ["data.sources.1.path:", str(tmp_path / "code.idx")]
    assert told == whole[: len(told)] and whole[len(told) :].startswith("sources\n")


def test_it_lays_out_other_ranks_and_says_whether_they_have_the_memory(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path), ["parallel.tp=2", "parallel.pp=2"])
    roomy, tight = (dry_run(config, ranks=8, gib=gib) for gib in (1.0, 1e-6))
    assert "dp=2" in roomy.replace(" ", "=") and "fits into 1 GiB" in roomy and "MORE THAN 1e-06 GiB" in tight
    assert "GiB of tensors on a rank" in dry_run(config, ranks=4) and "fits" not in dry_run(config, ranks=4)
    with pytest.raises(ConfigError, match="6"):
        dry_run(config, ranks=6)


def test_a_model_without_weights_is_enough(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape | {"num_attention_heads": 4, "max_position_embeddings": 512}))
    plain = write_run(tmp_path)
    config = load_config(plain, [f"model={{init_from: {tmp_path / 'model'}}}", "tokenizer=null"])
    missing = dry_run(config).split("not there yet\n")[1]
    assert f"model.init_from: {tmp_path / 'model'}/*.safetensors" in missing and "tokenizer: " in missing
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.init_from: .*config\.json is not there"):
        dry_run(config)


def test_without_tokenizer_and_vocabulary_there_is_no_shape(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path), ["model.vocab_size=null", f"tokenizer={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match=r"tokenizer: .*none is not there and model\.vocab_size is null"):
        dry_run(config)
