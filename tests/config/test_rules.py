"""Every rule of every room's options, as a user meets it: dotted path, value seen, what is accepted."""

from collections.abc import Callable

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError

Load = Callable[..., RunConfig]

REFUSED = [
    # types
    ("optimizer.lr=fast", "optimizer.lr: 'fast'; accepted: a number"),
    ("optimizer.lr='3e-4'", "optimizer.lr: '3e-4'; accepted: a number"),
    ("optimizer.lr=true", "optimizer.lr: true; accepted: a number"),
    ("optimizer.lr=1e999", "optimizer.lr: '1e999'; accepted: a number"),
    ("optimizer.betas=[0.9]", "optimizer.betas.1: not set; accepted: a value, because there is no default"),
    ("optimizer.betas=0.9", "optimizer.betas: 0.9; accepted: a list"),
    ("train.steps=1.5", "train.steps: 1.5; accepted: an integer"),
    ("train.steps=true", "train.steps: true; accepted: an integer"),
    ("model.qk_norm=yes", "model.qk_norm: 'yes'; accepted: true or false"),
    ("model.qk_norm=1", "model.qk_norm: 1; accepted: true or false"),
    ("run_dir=2024", "run_dir: 2024; accepted: text"),
    ("optimizer=", "optimizer: null; accepted: a section of keys"),
    ("data.sources={}", "data.sources: {}; accepted: a list"),
    ("data.sources.0=prose", "data.sources.0: 'prose'; accepted: a section of keys"),
    ("deepspeed=[]", "deepspeed: []; accepted: a section of keys"),
    # the run
    ("run_dir=''", "run_dir: ''; accepted: "),
    ("seed=-1", "seed: -1; accepted: greater than or equal to 0"),
    ("seed=1_000_000_000_000_000_000_000", "seed: 1000000000000000000000; accepted: less than"),
    ("tokenizer=null", "tokenizer: null; accepted: a directory; null with model.init_from or model.vocab_size"),
    # model
    ("model.hidden_size=0", "model.hidden_size: 0; accepted: at least 1"),
    ("model.vocab_size=0", "model.vocab_size: 0; accepted: at least 1"),
    ("model.num_heads=0", "model.num_heads: 0; accepted: at least 1"),
    ("model.num_kv_heads=3", "model.num_kv_heads: 3; accepted: a divisor of num_heads (4)"),
    ("model.hidden_size=254", "model.hidden_size: 254; accepted: a multiple of 2 num_heads (8) while head_dim is null"),
    ("model.hidden_size=252", "model.hidden_size: 252; accepted: a multiple of 2 num_heads (8) while head_dim is null"),
    ("model.head_dim=33", "model.head_dim: 33; accepted: an even number: rotary positions turn pairs"),
    ("model.rope_theta=0", "model.rope_theta: 0.0; accepted: more than 0, or null"),
    ("model.rope={kind: yarn, factor: 0.5}", "model.rope.factor: 0.5; accepted: at least 1, or null"),
    ("model.rope={kind: dynamic}", "model.rope.kind: 'dynamic'; accepted: default, linear, ntk, yarn, llama3"),
    ("model.rope={factor: 2}", "model.rope.kind: not set; accepted: a value, because there is no default"),
    ("model.norm_eps=0", "model.norm_eps: 0.0; accepted: more than 0"),
    ("model.init_std=-1", "model.init_std: -1.0; accepted: at least 0"),
    ("model.max_position=127", "model.max_position: 127; accepted: at least data.sequence_length (128), or null"),
    ("model.attention=spda", "model.attention: 'spda'; accepted: auto, dense, sdpa, varlen, flash_attn; nearest: sdpa"),
    # methods
    ("optimizer.half_fine_tuning={stage_steps: 0}", "optimizer.half_fine_tuning.stage_steps: 0; accepted: at least 1"),
    ("optimizer.magnitude_gate={threshold: 1}", "optimizer.magnitude_gate.threshold: 1.0; accepted: at least 0 and less than 1"),
    ("optimizer.meta_experience_replay={every: 0, factor: 0.5}", "optimizer.meta_experience_replay.every: 0; accepted: a number of steps"),
    ("optimizer.meta_experience_replay={every: 9, factor: 0}", "optimizer.meta_experience_replay.factor: 0.0; accepted: more than 0 and"),
    (
        "optimizer={sharding: zero2, half_fine_tuning: {stage_steps: 5}, magnitude_gate: {}}",
        "optimizer.sharding: 'zero2'; accepted: whole_tensor with half_fine_tuning, magnitude_gate: ZeRO hands out slices",
    ),
    ("optimizer={adamw: apex, half_fine_tuning: {stage_steps: 5}}", "optimizer.adamw: 'apex'; accepted: torch with half_fine_tuning"),
    (
        "optimizer={qk_clip: 9, magnitude_gate: {}}",
        "optimizer.qk_clip: 9.0; accepted: null with half_fine_tuning or magnitude_gate",
    ),
    (
        "optimizer={magnitude_gate: {}, meta_experience_replay: {every: 2, factor: 0.5}}",
        "optimizer.magnitude_gate: 'set'; accepted: null with meta_experience_replay",
    ),
    (
        "optimizer={half_fine_tuning: {stage_steps: 9}, meta_experience_replay: {every: 2, factor: 0.5}}",
        "optimizer.half_fine_tuning.stage_steps: 9; accepted: a multiple of meta_experience_replay.every (2)",
    ),
    (
        "data.validation=[{name: v, path: v, metadata: m}]",
        "data.validation.0.metadata: 'm'; accepted: nothing: it is for training, and evaluation would not heed it",
    ),
    ("distillation={teacher: x}", "distillation.kl: null; accepted: at least one of kl and hidden"),
    ("distillation={teacher: '', kl: {weight: 1}}", "distillation.teacher: ''; accepted: directory of a checkpoint"),
    ("distillation={teacher: x, kl: {weight: -1}}", "distillation.kl.weight: -1.0; accepted: at least 0"),
    ("distillation={teacher: x, hidden: {weight: 1, layers: [1, 1]}}", "distillation.hidden.layers: [1, 1]; accepted: different numbers"),
    ("distillation={teacher: x, kl: {weight: 1}, decay_steps: 0}", "distillation.decay_steps: 0; accepted: at least 1, or null"),
    ("loss_weighting={temperature: 0}", "loss_weighting.temperature: 0.0; accepted: more than 0"),
    ("loss_weighting={from_step: 0}", "loss_weighting.from_step: 0; accepted: at least 1"),
    # data
    ("data.sources=[]", "data.sources: []; accepted: at least one source"),
    ("data.sources.0.name=''", "data.sources.0.name: ''; accepted: a word"),
    ("data.sources.0.path=''", "data.sources.0.path: ''; accepted: path of a .bin/.idx pair without its ending"),
    ("data.sources.0.weight=0", "data.sources.0.weight: 0.0; accepted: more than 0"),
    ("data.sources.0.max_epochs=0", "data.sources.0.max_epochs: 0.0; accepted: more than 0, or null"),
    ("data.sources=[{name: a, path: x}, {name: a, path: y}]", "data.sources: ['a']; accepted: names that differ"),
    (
        "data.replay={share: 0.1, sources: [{name: prose, path: x}]}",
        "data.replay.sources: ['prose']; accepted: names that differ from those of sources",
    ),
    ("data.validation=[{name: v, path: x}, {name: v, path: y}]", "data.validation: ['v']; accepted: names that differ"),
    ("data.sequence_length=1", "data.sequence_length: 1; accepted: at least 2 tokens"),
    ("data.tokens_per_step=127", "data.tokens_per_step: 127; accepted: at least sequence_length (128)"),
    ("data.validation_fraction=1", "data.validation_fraction: 1.0; accepted: at least 0 and less than 1"),
    ("data.replay={share: 0, run: r}", "data.replay.share: 0.0; accepted: more than 0 and less than 1"),
    ("data.replay={share: 1, run: r}", "data.replay.share: 1.0; accepted: more than 0 and less than 1"),
    ("data.replay={share: 0.1}", "data.replay.run: null; accepted: exactly one of run and sources"),
    ("data.replay={share: 0.1, run: r, sources: [{name: a, path: b}]}", "data.replay.run: 'r'; accepted: exactly one of run and sources"),
    ("data.replay={run: r}", "data.replay.share: not set; accepted: a value, because there is no default"),
    ("data.repeats_warned_at=0", "data.repeats_warned_at: 0.0; accepted: more than 0, or null"),
    (
        "data.replay={share: 0.1, run: r, decay: {to: 1, tokens: 5}}",
        "data.replay.decay.to: 1.0; accepted: at least 0 and less than 1",
    ),
    ("data.replay={share: 0.1, run: r, decay: {to: 0, tokens: 0}}", "data.replay.decay.tokens: 0; accepted: at least 1"),
    ("data.stages=[{}, {}]", "data.stages.0.tokens: null; accepted: tokens or share in every stage but the last"),
    ("data.stages=[{tokens: 0}, {}]", "data.stages.0.tokens: 0; accepted: at least 1, or null in the last stage"),
    ("data.stages=[{share: 1}, {}]", "data.stages.0.share: 1.0; accepted: more than 0 and less than 1, or null"),
    ("data.stages=[{tokens: 5, share: 0.5}, {}]", "data.stages.0.share: 0.5; accepted: null, because tokens is set (5)"),
    ("data.stages=[{share: 0.6}, {share: 0.5}, {}]", "data.stages.1.share: 0.5; accepted: shares of the run that sum to less than 1"),
    ("data.stages=[{share: 0.6}, {tokens: 5}, {}]", "data.stages.1.tokens: 5; accepted: null behind a stage with a share"),
    ("data.stages=[{sequence_length: 1}]", "data.stages.0.sequence_length: 1; accepted: at least 2, or null"),
    ("data.stages=[{weights: {prose: -1}}]", "data.stages.0.weights: {'prose': -1.0}; accepted: numbers of at least 0"),
    ("data.stages=[{weights: {prose: 0}}]", "data.stages.0.weights: {'prose': 0.0}; accepted: more than 0 for at least one source"),
    ("data.stages=[{weights: {verse: 1}}]", "data.stages.0.weights: ['verse']; accepted: names of data.sources: prose"),
    ("data.stages=[{replay_share: 0.1}]", "data.stages.0.replay_share: 0.1; accepted: null without data.replay"),
    ("data.decomposition={smallest: 3, cycle_tokens: 5000}", "data.decomposition.smallest: 3; accepted: a power of two"),
    ("data.decomposition={smallest: 256, cycle_tokens: 5000}", "data.decomposition.smallest: 256; accepted: at most sequence_length (128)"),
    ("data.decomposition={smallest: 8, cycle_tokens: 1023}", "data.decomposition.cycle_tokens: 1023; accepted: at least tokens_per_step"),
    (
        "data.decomposition={smallest: 8, cycle_tokens: 5000, curriculum: grow}",
        "data.decomposition.curriculum: 'grow'; accepted: natural, uniform, grow_linear, grow_p2, grow_p100, shrink_p100; nearest: grow_p2",
    ),
    ("data.stages=[{metadata: false}]", "data.stages.0.metadata: false; accepted: true where no source has metadata"),
    ("data.sources.0.order=ascending", "data.sources.0.order: 'ascending'; accepted: shuffled without scores"),
    ("data.sources.0.min_tokens=0", "data.sources.0.min_tokens: 0; accepted: at least 1, or null"),
    # planning
    (
        "planning.policy=data-parallel",
        "planning.policy: 'data-parallel'; accepted: data_parallel, static, best_static, adaptive; nearest: data_parallel",
    ),
    ("planning={policy: static}", "planning.degree: null; accepted: a power of two, because policy is static"),
    ("planning={policy: adaptive, degree: 2}", "planning.degree: 2; accepted: null, because policy is adaptive"),
    ("planning={policy: static, degree: 3}", "planning.degree: 3; accepted: a power of two"),
    ("planning.largest_degree=6", "planning.largest_degree: 6; accepted: a power of two, or null"),
    ("planning={policy: static, degree: 4, largest_degree: 2}", "planning.degree: 4; accepted: at most largest_degree (2)"),
    ("planning.ahead=-1", "planning.ahead: -1; accepted: a number of steps, at least 0"),
    ("planning={policy: static, degree: 4, tokens_per_pack: 31}", "planning.tokens_per_pack: 31; accepted: at least 32, so that"),
    ("planning.tokens_per_pack=0", "planning.tokens_per_pack: 0; accepted: a number of tokens, at least 1, or null"),
    (
        "planning.tokens_per_pack=127",
        "planning.tokens_per_pack: 127; accepted: at least 128, so that a pack holds data.sequence_length (128)",
    ),
    # optimizer and schedule
    ("optimizer.lr=-1e-3", "optimizer.lr: -0.001; accepted: at least 0"),
    ("optimizer.betas=[0.9, 1]", "optimizer.betas: (0.9, 1.0); accepted: two numbers, each at least 0 and less than 1"),
    ("optimizer.betas=[-0.1, 0.9]", "optimizer.betas: (-0.1, 0.9); accepted: two numbers, each at least 0 and less than 1"),
    ("optimizer.eps=0", "optimizer.eps: 0.0; accepted: more than 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay: -1.0; accepted: at least 0"),
    ("optimizer.clip_norm=-1", "optimizer.clip_norm: -1.0; accepted: at least 0; 0 switches clipping off"),
    ("schedule.kind=cosin", "schedule.kind: 'cosin'; accepted: cosine, wsd, infinite, constant; nearest: cosine"),
    ("schedule.warmup_steps=-1", "schedule.warmup_steps: -1; accepted: at least 0"),
    ("schedule.warmup_steps=101", "schedule.warmup_steps: 101; accepted: at most the 100 steps of the run"),
    ("schedule={kind: wsd, decay_steps: -1}", "schedule.decay_steps: -1; accepted: at least 0 (no decay), or null"),
    ("schedule={kind: wsd, decay_steps: 101}", "schedule.decay_steps: 101; accepted: at most 100 steps less 0 of warm-up"),
    (
        "schedule={kind: wsd, decay_steps: 60, warmup_steps: 41}",
        "schedule.decay_steps: 60; accepted: at most 100 steps less 41 of warm-up",
    ),
    ("schedule.decay_steps=10", "schedule.decay_steps: 10; accepted: nothing (it is null), because kind cosine does not"),
    ("schedule.decay_shape=square", "schedule.decay_shape: 'square'; accepted: linear, cosine, one_minus_sqrt"),
    ("schedule.warmup_from=2", "schedule.warmup_from: 2.0; accepted: between 0 and 1"),
    (
        "schedule={kind: wsd, decay_shape: exponential, min_factor: 0}",
        "schedule.min_factor: 0.0; accepted: more than 0 with decay_shape exponential",
    ),
    ("schedule.decay_ends=[0]", "schedule.decay_ends: [0]; accepted: steps, each later than the one before"),
    ("schedule.decay_ends=[20, 20]", "schedule.decay_ends: [20, 20]; accepted: steps, each later than the one before"),
    ("schedule.decay_ends=[100]", "schedule.decay_ends: [100]; accepted: steps before the last of the run (100)"),
    ("schedule={kind: constant, decay_ends: [50]}", "schedule.decay_ends: [50]; accepted: nothing (it is []), because kind constant"),
    ("schedule={kind: constant, min_factor: 0}", "schedule.min_factor: 0.0; accepted: nothing (it is 0.1), because kind constant"),
    (
        "schedule={decay_shape: cosine}",
        "schedule.decay_shape: 'cosine'; accepted: nothing (it is 'linear'), because kind cosine does not heed it; "
        "kinds that do: wsd, infinite",
    ),
    (
        "schedule={kind: wsd, constant_factor: 0.4}",
        "schedule.constant_factor: 0.4; accepted: nothing (it is 0.5), because kind wsd does not heed it; kinds that do: infinite",
    ),
    ("schedule={cooldown_shape: linear}", "schedule.cooldown_shape: 'linear'; accepted: nothing (it is 'inverse_sqrt'), because"),
    ("schedule={kind: wsd, cooldown_steepness: 3}", "schedule.cooldown_steepness: 3.0; accepted: nothing (it is 10.0), because kind wsd"),
    ("schedule={kind: wsd, decay_ends: [50], decay_steps: 0}", "schedule.decay_steps: 0; accepted: at least 1 with decay_ends, or null"),
    ("schedule={kind: wsd, decay_ends: [70], decay_steps: 31}", "schedule.decay_steps: 31; accepted: at most 30, the fewest steps between"),
    ("schedule={decay_ends: [50], warmup_steps: 51}", "schedule.warmup_steps: 51; accepted: at most the 50 steps up to the first"),
    ("schedule={decay_ends: [50], rewarm_steps: 51}", "schedule.rewarm_steps: 51; accepted: at most the steps from one decay's end"),
    ("schedule.rewarm_steps=1", "schedule.rewarm_steps: 1; accepted: 0 without decay_ends"),
    ("schedule.rewarm_steps=-1", "schedule.rewarm_steps: -1; accepted: at least 0"),
    ("schedule.cooldown_steps=1", "schedule.cooldown_steps: 1; accepted: nothing (it is 0), because kind cosine does not"),
    ("schedule={kind: infinite}", "schedule.cooldown_steps: 0; accepted: at least 1, or the rate would jump from 1 to constant_factor"),
    ("schedule={kind: infinite, cooldown_steps: -1}", "schedule.cooldown_steps: -1; accepted: at least 0"),
    (
        "schedule={kind: infinite, warmup_steps: 40, cooldown_steps: 40, decay_steps: 21}",
        "schedule.cooldown_steps: 40; accepted: at most 100 steps less 40 of warm-up and 21 of decay",
    ),
    ("schedule={kind: infinite, cooldown_steps: 1, cooldown_steepness: 0}", "schedule.cooldown_steepness: 0.0; accepted: more than 0"),
    (
        "schedule={kind: infinite, cooldown_steps: 1, constant_factor: 0, min_factor: 0}",
        "schedule.constant_factor: 0.0; accepted: more than 0, at most 1",
    ),
    (
        "schedule={kind: infinite, cooldown_steps: 1, constant_factor: 0.3, min_factor: 0.4}",
        "schedule.min_factor: 0.4; accepted: at most constant_factor (0.3)",
    ),
    ("schedule.min_factor=1.1", "schedule.min_factor: 1.1; accepted: between 0 and 1"),
    # train, evaluation, logging, checkpoint
    ("train={}", "train.steps: null; accepted: a number of steps, or null with tokens set"),
    ("train.tokens=5", "train.tokens: 5; accepted: null, because steps is set (100); exactly one of the two"),
    ("train.steps=0", "train.steps: 0; accepted: at least 1"),
    ("train={tokens: 0}", "train.tokens: 0; accepted: at least 1"),
    ("train.dtype=bf16", "train.dtype: 'bf16'; accepted: auto, bfloat16, float32, float64"),
    ("train.threads_per_rank=0", "train.threads_per_rank: 0; accepted: at least 1, or null"),
    ("evaluation.every=0", "evaluation.every: 0; accepted: a number of steps, at least 1, or null"),
    ("evaluation.tokens=0", "evaluation.tokens: 0; accepted: at least 1"),
    ("logging.every=0", "logging.every: 0; accepted: a number of steps, at least 1"),
    ("checkpoint.every=0", "checkpoint.every: 0; accepted: a number of steps, at least 1, or null"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last: 0; accepted: at least 1"),
    ("checkpoint.branch_from=''", "checkpoint.branch_from: ''; accepted: a checkpoint directory, or null"),
    ("checkpoint={branch_from: c, resume: never}", "checkpoint.branch_from: 'c'; accepted: null with resume never"),
    ("checkpoint.resume=''", "checkpoint.resume: ''; accepted: auto, never or a checkpoint directory"),
    ("checkpoint.max_shard_gib=0", "checkpoint.max_shard_gib: 0.0; accepted: GiB, more than 0"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[override for override, _ in REFUSED])
def test_refused_with_path_value_and_what_is_accepted(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(override)
    lines = str(error.value).splitlines()
    assert len(lines) == 1, "one broken rule is one line"
    assert lines[0].startswith(f"command line: {message}")


ACCEPTED = [
    "model.num_kv_heads=4",
    "model={hidden_size: 100, num_heads: 3, num_kv_heads: 1, head_dim: 32}",
    "model.max_position=128",
    "data.tokens_per_step=128",
    "data.sequence_length=2",
    "data.validation_fraction=0.5",
    "data.validation=[{name: prose, path: x}]",
    "data.replay={share: 0.999, run: r}",
    "data.replay={share: 0.1, sources: [{name: a, path: b}]}",
    "data.stages=[{tokens: 5, sequence_length: 256}, {share: 0.5, weights: {prose: 2}}, {}]",
    "data.replay={share: 0.1, run: r, decay: {to: 0, tokens: 5, shape: cosine}}",
    "data.decomposition={smallest: 8, cycle_tokens: 5000}",
    "data.sources=[{name: a, path: x, metadata: y}, {name: b, path: x, scores: s, order: descending, subset_tokens: 5}]",
    "planning.tokens_per_pack=128",
    "optimizer={lr: 0, betas: [0, 0.999], clip_norm: 0}",
    "schedule={kind: wsd, decay_steps: 60, warmup_steps: 40}",
    "schedule={kind: constant, warmup_steps: 100}",
    "schedule={min_factor: 0}",
    "schedule={kind: infinite, cooldown_steps: 0, constant_factor: 1}",
    "schedule={kind: constant, min_factor: 0.1, cooldown_steps: 0, decay_shape: linear}",
    "schedule={kind: wsd, decay_steps: 0}",
    "schedule={kind: wsd, decay_steps: 30, decay_ends: [30, 70], warmup_steps: 0}",
    "schedule={kind: infinite, warmup_steps: 40, cooldown_steps: 40, decay_steps: 20, decay_shape: exponential}",
    "schedule={decay_ends: [50], rewarm_steps: 50}",
    "train={tokens: 1e6}",
    "train.dtype=float64",
    "checkpoint={every: 1, keep_last: 1, resume: some/step_00000001}",
    "model={init_from: hf, attention: dense}",
    "model={init_from: hf, rope_theta: 5e6, max_position: 65536, rope: {kind: yarn, factor: 8}}",
    "seed=9_223_372_036_854_775_807",
]


@pytest.mark.parametrize("override", ACCEPTED)
def test_values_on_the_border_are_accepted(load: Load, override: str) -> None:
    assert isinstance(load(override), RunConfig)


def test_held_out_part_and_validation_corpus_need_two_names(load: Load) -> None:
    overrides = ["data.validation=[{name: prose, path: x}]", "data.validation_fraction=0.1"]
    with pytest.raises(ConfigError, match=r"data\.validation: \['prose'\]; accepted: names that differ from those of sources while"):
        load(*overrides)
    load(*overrides, "data.validation.0.name=other")


def test_shape_keys_beside_init_from_are_named(load: Load) -> None:
    with pytest.raises(ConfigError) as error:
        load("model={init_from: hf, attention: sdpa, hidden_size: 256, qk_norm: false}")
    because = "accepted: not set, because the shape comes from model.init_from"
    assert str(error.value).splitlines() == [
        f"command line: model.hidden_size: 256; {because}",
        f"command line: model.qk_norm: false; {because}",
    ]


def test_vocabulary_may_come_from_the_checkpoint_or_from_its_size(load: Load) -> None:
    assert load("tokenizer=null", "model.init_from=hf").tokenizer is None
    assert load("tokenizer=null", "model.vocab_size=300").tokenizer is None
