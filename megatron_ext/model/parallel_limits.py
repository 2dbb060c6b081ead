"""Which grids a model can be divided by."""

from megatron_ext.errors import ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.parallel.options import ParallelOptions


def check_divides(model: ModelConfig, options: ParallelOptions) -> None:
    """Refuse what cannot be divided, before any rank speaks to another. The vocabulary need not divide: its rows are spread unevenly.

    Raises:
        ConfigError: names the key, its value and the sizes that would do.
    """
    tps = [tp for tp in range(1, model.num_heads + 1) if _tp_fits(model, tp)]
    if options.tp not in tps:
        raise ConfigError(
            f"parallel.tp is {options.tp}; accepted: {', '.join(map(str, tps))}: it must divide model.num_heads ({model.num_heads}) and "
            f"model.intermediate_size ({model.intermediate_size}), and divide or be a multiple of model.num_kv_heads ({model.num_kv_heads})"
        )
    if options.pp > model.num_layers:
        raise ConfigError(f"parallel.pp is {options.pp}; accepted: 1 to model.num_layers ({model.num_layers})")
    layers = options.layers_per_stage
    if layers is not None and sum(layers) != model.num_layers:
        raise ConfigError(f"parallel.layers_per_stage is {layers}; accepted: numbers whose sum is model.num_layers ({model.num_layers})")
    if layers is not None and 0 in layers[1:-1]:
        raise ConfigError(f"parallel.layers_per_stage is {layers}; accepted: 0 only on the first and the last stage")


def _tp_fits(model: ModelConfig, tp: int) -> bool:
    heads_fit = model.num_heads % tp == 0 and (model.num_kv_heads % tp == 0 or tp % model.num_kv_heads == 0)
    return heads_fit and model.intermediate_size % tp == 0
