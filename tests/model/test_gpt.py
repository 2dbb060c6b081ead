"""The whole model over packs: what a document computes does not depend on its neighbours."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT, parameter_shapes

CONFIG = ModelConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=4, max_position=64
)
LENGTHS = [5, 1, 17, 0, 2, 9]
CPU_BACKENDS = ["dense", "sdpa"]


def model_of(config: ModelConfig = CONFIG, backend: str = "sdpa", **keys: str) -> GPT:
    model = GPT(config, attention=backend, **keys).double()
    model.reset_parameters(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


class Pack:
    """Documents of the given lengths with labels and weights."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = sum(lengths)
        self.lengths = lengths
        self.tokens = torch.randint(CONFIG.vocab_size, (tokens,), generator=generator)
        self.labels = torch.randint(CONFIG.vocab_size, (tokens,), generator=generator)
        self.weight = torch.rand(tokens, generator=generator)
        self.weight[::4] = 0

    def documents(self) -> list["Pack"]:
        """Each document as a pack of its own."""
        packs = [Pack([length]) for length in self.lengths]
        for name in ("tokens", "labels", "weight"):
            for pack, part in zip(packs, getattr(self, name).split(self.lengths), strict=True):
                setattr(pack, name, part)
        return packs

    def boundaries(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)

    def positions(self) -> torch.Tensor:
        return torch.cat([torch.arange(length) for length in [*self.lengths, 0]])

    def logits(self, model: GPT) -> torch.Tensor:
        return model.logits(self.tokens, self.positions(), self.boundaries(), max(self.lengths, default=0))

    def loss(self, model: GPT) -> tuple[torch.Tensor, torch.Tensor]:
        return model(self.tokens, self.positions(), self.boundaries(), max(self.lengths, default=0), self.labels, self.weight)


def loss_and_gradients(model: GPT, packs: list[Pack]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for pack in packs:
        loss, _ = pack.loss(model)
        loss.backward()
        total += loss.detach()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(first: tuple[torch.Tensor, dict[str, torch.Tensor]], second: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    assert abs(first[0] - second[0]) < 1e-10 * abs(second[0])
    for name, grad in first[1].items():
        assert (grad - second[1][name]).norm() <= 1e-10 * second[1][name].norm(), name


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, qk_norm=True, tie_embeddings=True), replace(CONFIG, qkv_bias=True, head_dim=6)])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_pack_is_the_sum_of_its_documents(backend: str, config: ModelConfig) -> None:
    pack, model = Pack(LENGTHS), model_of(config, backend)
    whole = loss_and_gradients(model, [pack])
    assert all(grad.any() for grad in whole[1].values())
    assert_same(whole, loss_and_gradients(model, pack.documents()))
    assert_same(whole, loss_and_gradients(model_of(config, "dense"), [pack]))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_without_boundaries_a_pack_is_not_the_sum(backend: str) -> None:
    """The control: the same tokens and positions as one document must give other gradients."""
    pack, model = Pack(LENGTHS), model_of(backend=backend)
    apart = loss_and_gradients(model, pack.documents())
    pack.boundaries = lambda: torch.tensor([0, sum(LENGTHS)], dtype=torch.int32)
    with pytest.raises(AssertionError):
        assert_same(loss_and_gradients(model, [pack]), apart)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("changed", [0, 2, 5])
def test_a_changed_token_changes_no_other_document(backend: str, changed: int) -> None:
    pack, model = Pack(LENGTHS), model_of(backend=backend)
    start = sum(LENGTHS[:changed])
    before = pack.logits(model)
    pack.tokens[start] = (pack.tokens[start] + 1) % CONFIG.vocab_size
    difference = (pack.logits(model) - before).abs().amax(1).split(LENGTHS)
    for document, change in enumerate(difference):
        if document == changed:
            assert (change > 0).all()
        else:
            assert not change.any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_token_sees_a_later_one(backend: str) -> None:
    pack, model = Pack([12]), model_of(backend=backend)
    before = pack.logits(model)
    pack.tokens[7] = (pack.tokens[7] + 1) % CONFIG.vocab_size
    change = (pack.logits(model) - before).abs().amax(1)
    assert not change[:7].any()
    assert (change[7:] > 0).all()


def test_tokens_of_weight_zero_contribute_nothing() -> None:
    pack, model = Pack(LENGTHS), model_of()
    whole = loss_and_gradients(model, [pack])
    pack.labels[pack.weight == 0] = -100
    assert_same(whole, loss_and_gradients(model, [pack]))
    weight = pack.weight.clone()
    pack.weight = torch.zeros_like(weight)
    nothing = loss_and_gradients(model, [pack])
    assert nothing[0] == 0
    assert not any(grad.any() for grad in nothing[1].values())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1, 0]])
def test_hardly_any_tokens(lengths: list[int], backend: str) -> None:
    pack, model = Pack(lengths), model_of(backend=backend)
    pack.weight[:] = 1
    loss, token_loss = pack.loss(model)
    loss.backward()
    assert token_loss.shape == (sum(lengths),)
    assert not token_loss.requires_grad
    assert loss == token_loss.sum()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_int32_tokens() -> None:
    pack, model = Pack(LENGTHS), model_of()
    expected = pack.logits(model)
    pack.tokens = pack.tokens.to(torch.int32)
    assert torch.equal(pack.logits(model), expected)


@pytest.mark.parametrize("keys", [{}, {"tie_embeddings": True}])
def test_loss_and_gradients_equal_transformers(keys: dict[str, bool]) -> None:
    config = replace(CONFIG, **keys)
    model = model_of(config)
    shape = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": config.tie_embeddings, "rms_norm_eps": 1e-5}
    theirs = LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="eager")).double()
    theirs.load_state_dict(model.state_dict(), strict=not config.tie_embeddings)
    # transformers rounds norms, angles and logits to float32 inside a float64 model, which bounds the agreement.
    pack = Pack([21])
    pack.weight[:] = 1
    logits = theirs(pack.tokens[None]).logits[0]
    torch.nn.functional.cross_entropy(logits, pack.labels, reduction="sum").backward()
    _, ours = loss_and_gradients(model, [pack])
    for name, parameter in theirs.named_parameters():
        assert (ours[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize(("recompute", "share"), [("full", 0.5), ("selective", 0.75)])
def test_activation_checkpointing_changes_memory_and_no_number(recompute: str, share: float) -> None:
    pack = Pack(LENGTHS)
    kept, recomputed = model_of(), model_of(recompute=recompute)
    expected, found = loss_and_gradients(kept, [pack]), loss_and_gradients(recomputed, [pack])
    assert torch.equal(expected[0], found[0])
    assert all(torch.equal(grad, found[1][name]) for name, grad in expected[1].items())
    assert saved_bytes(recomputed, pack) < share * saved_bytes(kept, pack)


def saved_bytes(model: GPT, pack: Pack) -> int:
    """Bytes of the tensors that a forward keeps for backward, parameters left out."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pack.loss(model)
    return sum(saved.values())


def test_bfloat16_stays_near_float64() -> None:
    pack = Pack(LENGTHS)
    exact, _ = pack.loss(model_of())
    loss, token_loss = pack.loss(model_of().to(torch.bfloat16))
    assert loss.dtype == token_loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_names_and_shapes() -> None:
    model = model_of(replace(CONFIG, qk_norm=True))
    shapes = parameter_shapes(model.config)
    assert shapes == {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes["model.layers.1.self_attn.k_norm.weight"] == (4,)
    assert "lm_head.weight" not in parameter_shapes(replace(CONFIG, tie_embeddings=True))
