"""A second device that the CPU plays. It refuses calls that mix it with the first, and those whose
results vary from run to run on a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

DEVICE = torch.device("cuda")


class Elsewhere(TorchFunctionMode):
    """While it is entered tensors can be on DEVICE: they say so, and every call that takes some of
    there and some of the CPU's raises RuntimeError, as one of a GPU does. A CPU's tensor without
    dimensions, or an index, may go with either. A call whose result varies from run to run on a GPU
    raises RuntimeError too."""

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _STORED.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return DEVICE if is_there(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return is_there(args[0])
        taken = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = any(map(is_there, taken))
        if name in ("to", "cpu"):
            return _moved(*args, **kwargs) if name == "to" else _moved(args[0], "cpu")
        if name == "numpy" and there:
            raise TypeError("can't convert a tensor of elsewhere to numpy")
        indexing = name in ("__getitem__", "__setitem__") and is_there(args[0])
        for tensor in taken:
            apart = there and not is_there(tensor) and tensor.dim() and not tensor.is_meta
            if apart and not (name == "copy_" or indexing):
                raise RuntimeError(f"{name}: tensors of two devices")
        if there and varies(name, args, kwargs):
            raise RuntimeError(f"{name}: does not give the same bits in each run on a GPU")
        if kwargs.get("device") is not None:
            wanted = torch.device(kwargs["device"])
            there = wanted == DEVICE
            kwargs["device"] = torch.device("cpu") if there else wanted
        made = func(*args, **kwargs)
        if there and not (name == "copy_" and not is_there(args[0])):
            pytree.tree_map_only(Tensor, _put_there, made)
        return made


# Sums in the order in which a GPU's threads come, and writes of which the last one stays.
_VARYING = {
    *("index_add", "index_copy", "index_reduce", "put", "scatter", "scatter_add", "histc"),
    *("index_put", "kthvalue", "grid_sample", "interpolate", "embedding_bag"),
}


def varies(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether torch calls this call not deterministic on a GPU (use_deterministic_algorithms).

    Largest and smallest values do not depend on an order, nor do counts, nor sums of whole numbers.
    """
    function = name.rstrip("_")
    if function == "scatter_reduce":
        return not any(
            isinstance(v, str) and v in ("amax", "amin") for v in (*args, *kwargs.values())
        )
    if function == "bincount":
        return len(args) > 1 or kwargs.get("weights") is not None
    if function == "cumsum":
        return args[0].is_floating_point() and not torch.equal(args[0], args[0].round())
    if function == "median":
        return len(args) > 1 or "dim" in kwargs
    return function in _VARYING


def _moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to, DEVICE being where the CPU keeps tensors that say so."""
    copy = kwargs.pop("copy", False)
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    how = {} if memory_format is None else {"memory_format": memory_format}
    if device is not None and device.type == "meta":
        return tensor.to(device, dtype or tensor.dtype, **how)
    there = is_there(tensor) if device is None else device == DEVICE
    moves = there != is_there(tensor)
    made = tensor.to(dtype=dtype or tensor.dtype, copy=copy or moves, **how)
    return _put_there(made) if there else made


# What lies there, by the address of its record: kept, so that no other storage gets it.
_STORED: dict[int, torch.UntypedStorage] = {}


def is_there(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.untyped_storage()._cdata in _STORED


def _put_there(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        storage = tensor.untyped_storage()
        _STORED[storage._cdata] = storage
    return tensor
