"""A model in several places, on GPUs, in the memory of the CPU and on a disk: accelerate fetches what a call needs.

A layer that is not on the device that computes has its weights on "meta"; hooks of accelerate bring them for its call.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpt2_multi.errors import InputError, shortened
from gpt2_multi.pt.state import EMBEDDING, is_tied

NAMES = ("auto", "balanced", "balanced_low_0", "sequential")
DISK = "disk"


def wanted(
    device_map: Any, max_memory: Mapping[Any, Any] | None, known: Sequence[str]
) -> tuple[torch.device | None, bool]:
    """The one place of a model, if somebody says it, and whether accelerate has to place it instead.

    known: the devices that are here. Raises InputError for others.
    """
    divided = is_divided(device_map, max_memory)
    for name, given in (("device_map", device_map), ("max_memory", max_memory)):
        for place in places_of(given, name):
            device_of(place, known, name)
    return None if divided or device_map is None else device_of(device_map, known), divided


def device_of(device_map: Any, known: Sequence[str], name: str = "device_map") -> torch.device:
    """The place of a whole model, as transformers spells it; InputError for several places, or one that is not here.

    known: the devices that are here, the fastest first.
    """
    places = [*device_map.values()] if isinstance(device_map, Mapping) else [device_map]
    if not places or any(place != places[0] for place in places) or DISK in places:
        raise InputError(
            f"device_map: expected one place for the whole model, found {device_map!r}; give the name of one device"
        )
    place = places[0]
    try:
        device = torch.device(known[0] if place in NAMES else place)
    except (RuntimeError, TypeError):
        device = None
    if device is None or not {str(device), f"{device.type}:0" if device.index is None else ""} & {*known, "meta"}:
        names = ", ".join(f'"{name}"' for name in known)
        choices = f'"auto" or one of {names}' if name == "device_map" else f"one of {names}"
        raise InputError(f"{name}: expected {choices}, found {place!r}")
    return device


def of_quantized(device_map: Any, max_memory: Any, known: Sequence[str]) -> torch.device:
    """The place of a model that other programs quantize, which is small: one, and the fastest if nobody says it."""
    if max_memory is not None:
        raise InputError(
            "max_memory: expected None for a quantized model, which is in one place; leave it out, and name one device "
            "in device_map"
        )
    return device_of("auto" if device_map is None else device_map, known)


def is_divided(device_map: Any, max_memory: Any) -> bool:
    """Whether a model may be in several places, so that accelerate has to place it.

    "auto" alone may be so only where there is a GPU, and accelerate to look at how much room it has.
    """
    if isinstance(device_map, Mapping):
        places = [*device_map.values()]
        return DISK in places or any(place != places[0] for place in places)
    if isinstance(device_map, str) and device_map in NAMES:
        return max_memory is not None or (torch.accelerator.is_available() and find_spec("accelerate") is not None)
    if max_memory is not None:
        raise InputError('max_memory: expected device_map="auto", which it is for; give both, or neither')
    return False


def places_of(given: Any, name: str) -> list[Any]:
    """The devices that the values of a device_map name, or the keys of a max_memory, each once; the disk is none."""
    found = () if not isinstance(given, Mapping) else given if name == "max_memory" else given.values()
    return [place for i, place in enumerate(found) if place != DISK and place not in [*found][:i]]


def divide(
    model: Any, device_map: Any, max_memory: Mapping[Any, Any] | None, offload_folder: Any, mmap: bool = False
) -> Any:
    """Put the parts of a model where a map says, or where they fit; what is offloaded does not train.

    max_memory: {device: bytes, or a text such as "10GB"}. A folder of its own in `offload_folder` has what is on the
    disk, as long as the model is there. With `mmap`, what stays on the CPU may be of the file that it is mapped from.
    Raises InputError for too little room, and where an offloaded model is to compute in another dtype than it is stored
    in; whether a map names the model's parts is for `check_map` to say.
    """
    model = dispatched(model, device_map, max_memory, offload_folder)
    check_offloaded(model)
    if not mmap:
        leave_file(model)
    return model


def check_offloaded(model: Any) -> None:
    """An offloaded model computes with what is fetched, as it is."""
    offloaded = any(x.is_meta for x in model.parameters())
    if offloaded and model.compute_dtype not in (None, next(model.parameters()).dtype):
        raise InputError(
            f"dtype: expected what the parameters of an offloaded model are stored in, found {model.compute_dtype}; "
            "leave param_dtype out"
        )


def leave_file(model: Any) -> None:
    """Give parameters memory of their own, which may be mapped from a file."""
    tied = model.body.wte.weight, getattr(getattr(model, "lm_head", None), "weight", None)
    for x in model.parameters():
        if not x.is_meta and not any(x is one for one in tied):  # which accelerate knows by their addresses
            x.data = x.data.clone(memory_format=torch.contiguous_format)


def dispatched(model: Any, device_map: Any, max_memory: Mapping[Any, Any] | None, offload_folder: Any) -> Any:
    """A model whose parts accelerate has put in their places."""
    try:
        import accelerate
    except ImportError:
        raise InputError(
            'device_map: a model in several places needs accelerate: pip install "gpt2-multi[large]"; without it give '
            'one place, such as "cpu"'
        ) from None
    found = device_map if isinstance(device_map, Mapping) else fitting(model, device_map, max_memory)
    found = settled(model, found)
    places = set(found.values())
    if len(places) == 1 and DISK not in places:
        return model.to(*places)
    folder = offloading(model, offload_folder) if DISK in places else None
    computes = next((place for place in found.values() if place not in ("cpu", DISK)), "cpu")
    hooks = {"main_device": computes, "force_hooks": True}  # said, as accelerate of 2024 refuses the disk alone
    accelerate.dispatch_model(model, found, offload_dir=folder, **hooks)
    model.hf_device_map = found
    if any(x.is_meta for x in model.parameters()):
        model.requires_grad_(False)  # a gradient would be of a copy that is gone after the call
    return model


def fitting(model: Any, name: str, max_memory: Mapping[Any, Any] | None) -> dict[str, Any]:
    """A map of the parts of a model to where they fit: GPUs first, then the CPU, then the disk."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    whole = {"no_split_module_classes": model._no_split_modules}
    try:
        memory = get_max_memory(None if max_memory is None else dict(max_memory))
        if name != "sequential":
            memory = get_balanced_memory(model, memory, **whole, low_zero=name == "balanced_low_0")
        return dict(infer_auto_device_map(model, memory, **whole))
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f'max_memory: expected room by device, such as {{0: "10GB", "cpu": "30GB"}}, found '
            f"{shortened(repr(max_memory))}, of which accelerate says: {shortened(str(error), 300)}"
        ) from None


def check_map(model: Any, device_map: Mapping[str, Any]) -> None:
    """A map names parts of the model, and all of them."""
    parts = {"", *(name for name, _ in model.named_modules()), *dict(model.named_parameters(remove_duplicate=False))}
    if extra := [name for name in device_map if name not in parts]:
        raise InputError(
            f"device_map: {type(model).__name__} has no {shortened(', '.join(map(str, extra)))}; its parts are such as "
            f"{', '.join(name for name, _ in model.named_children())}"
        )
    if lacking := [name for name, _ in model.named_parameters() if not is_under(name, device_map)]:
        raise InputError(f"device_map: gives no place to {shortened(', '.join(lacking))}; give them one too")


def settled(model: Any, device_map: Mapping[str, Any]) -> dict[str, Any]:
    """A map with a tied head where its embedding is, and without "", of which accelerate would write no file."""
    rest = {name: place for name, place in device_map.items() if name}
    whole = {name: device_map[""] for name, _ in model.named_children()} if "" in device_map else {}
    found = whole | rest
    if is_tied(model):
        above = [name for name in found if is_under(EMBEDDING, [name])]
        found = {name: place for name, place in found.items() if not is_under(name, ["lm_head"])}
        found["lm_head"] = found[max(above, key=len)]
    return found


def is_under(name: str, paths: Iterable[str]) -> bool:
    """Whether a parameter is part of one of these."""
    return any(not path or name == path or name.startswith(f"{path}.") for path in paths)


def offloading(model: Any, offload_folder: str | os.PathLike[str] | None) -> str:
    """A new folder for what is on the disk, which goes when the model does: accelerate would take old files for its."""
    if offload_folder is None:
        raise InputError(
            "offload_folder: expected a folder on a disk, for what fits nowhere else, found None; give one, or a "
            "device_map without the disk"
        )
    try:
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="offloaded-", dir=offload_folder)
    except OSError as error:
        raise InputError(f"offload_folder: expected a folder to write to, found {offload_folder}: {error}") from None
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return folder
