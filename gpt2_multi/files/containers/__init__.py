"""The containers of tensors that checkpoints come in; no code in a file is ever run.

Each is imported when a file of its kind is met.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_multi.files.containers.flat_files import read_flat as read_flat
    from gpt2_multi.files.containers.flat_files import read_header as read_header
    from gpt2_multi.files.containers.flat_files import write_flat as write_flat
    from gpt2_multi.files.containers.hdf5 import read_hdf5 as read_hdf5
    from gpt2_multi.files.containers.hdf5 import write_hdf5 as write_hdf5
    from gpt2_multi.files.containers.msgpack_files import read_msgpack as read_msgpack
    from gpt2_multi.files.containers.msgpack_files import write_msgpack as write_msgpack
    from gpt2_multi.files.containers.safetensors import read_metadata as read_metadata
    from gpt2_multi.files.containers.safetensors import read_safetensors as read_safetensors
    from gpt2_multi.files.containers.safetensors import read_shards as read_shards
    from gpt2_multi.files.containers.safetensors import write_safetensors as write_safetensors
    from gpt2_multi.files.containers.safetensors import write_shards as write_shards
    from gpt2_multi.files.containers.tf_bundle import read_bundle as read_bundle
    from gpt2_multi.files.containers.tf_bundle import write_bundle as write_bundle
    from gpt2_multi.files.containers.torch_save import read_outline as read_outline
    from gpt2_multi.files.containers.torch_save import read_torch as read_torch
    from gpt2_multi.files.containers.torch_save import write_torch as write_torch

_MODULES = {
    "flat": "flat_files",
    "header": "flat_files",
    "hdf5": "hdf5",
    "msgpack": "msgpack_files",
    "safetensors": "safetensors",
    "metadata": "safetensors",
    "shards": "safetensors",
    "bundle": "tf_bundle",
    "torch": "torch_save",
    "outline": "torch_save",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        way, _, what = name.partition("_")
        if way not in ("read", "write") or what not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[what]}"), name)
