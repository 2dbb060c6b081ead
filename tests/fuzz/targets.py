"""All formats that are fuzzed, by name."""

from collections.abc import Mapping

from tests.fuzz import checkpoint_targets, data_targets, run_targets, text_targets
from tests.fuzz.target import Target

TARGETS: Mapping[str, Target] = {
    "config": text_targets.CONFIG_TARGET,
    "study": text_targets.STUDY_TARGET,
    "metrics": text_targets.METRICS_TARGET,
    "events": text_targets.EVENTS_TARGET,
    "points": text_targets.TABLE_TARGET,
    "costs": text_targets.COSTS_TARGET,
    "plan": text_targets.PLAN_TARGET,
    "idx": data_targets.PAIR_TARGET,
    "jsonl": data_targets.JSON_LINES_TARGET,
    "gzip": data_targets.GZIP_TARGET,
    "parquet": data_targets.PARQUET_TARGET,
    "text": data_targets.TEXT_TARGET,
    "scores": data_targets.SCORES_TARGET,
    "tokenizer": data_targets.TOKENIZER_TARGET,
    "safetensors": checkpoint_targets.SAFETENSORS_TARGET,
    "model_index": checkpoint_targets.MODEL_INDEX_TARGET,
    "hf_config": checkpoint_targets.HF_CONFIG_TARGET,
    "own_config": checkpoint_targets.OWN_CONFIG_TARGET,
    "checkpoint": checkpoint_targets.CHECKPOINT_TARGET,
    "ledger": run_targets.LEDGER_TARGET,
    "digests": run_targets.DIGESTS_TARGET,
    "lock": run_targets.LOCK_TARGET,
    "hosts": run_targets.HOSTS_TARGET,
}
