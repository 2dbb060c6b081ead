"""A safetensors file that is written tensor by tensor, so that a rank need not hold more than one that it did not have anyway.

The safetensors library writes a file from all of its tensors at once. The container is eight bytes with the length of a JSON header, the
header, and the values in the order of the header; the library reads what is written here.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_ext.atomic_io import atomic_open

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Kind = tuple[torch.dtype, torch.Size]
SYNC_BYTES = 2**28
"""Written at most before they are flushed to disk: at the end of a large file that would take so long that it looks like standstill."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file of weights from tensors that are all there."""
    with tensor_file(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, {"format": "pt"}) as write:
        for tensor in tensors.values():
            write(tensor)


@contextmanager
def tensor_file(
    path: Path, tensors: Mapping[str, Kind], metadata: Mapping[str, str] | None = None, moved: Callable[[], None] = lambda: None
) -> Iterator[Callable[[torch.Tensor], None]]:
    """A function that appends the next tensor. The file appears under its name when the block ends, and not at all if it ends by an error.

    Args:
        path: name of the file.
        tensors: dtype and shape by name, in the order in which the tensors will be written.
        metadata: strings for the header.
        moved: called after each tensor.
    """
    expected = iter(tensors.values())
    header = _header(tensors, metadata or {})
    with atomic_open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        synced = 0

        def write(tensor: torch.Tensor) -> None:
            nonlocal synced
            assert (tensor.dtype, tensor.shape) == next(expected), "tensors come as they were announced"
            values = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(memoryview(values.view(torch.uint8).numpy()))
            if file.tell() - synced >= SYNC_BYTES:
                file.flush()
                os.fdatasync(file.fileno())
                synced = file.tell()
            moved()

        yield write
        assert next(expected, None) is None, "every announced tensor was written"


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The values as they are now, in memory of the host that nobody else writes to."""
    return tensor.detach().to("cpu", copy=True)


def _header(tensors: Mapping[str, Kind], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Values begin at a multiple of eight bytes, as readers that map the file into memory want.
    return text + b" " * (-len(text) % 8)
