"""Sources of the kernels; ``megatron_ext.csrc`` is a link to here."""
