"""A device that is not the host, on any machine: tensors that say they are elsewhere and hold real numbers.

They refuse what a GPU would refuse. Mixing devices is an error, as on a GPU (numbers and indices from the host are
allowed there, too). What would make a host wait for a GPU is counted: asking for a number, copying to the host, copying
from ordinary memory without `non_blocking`.
"""
import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from tape import Tape

FAR = torch.device("meta")  # a device that every build of PyTorch knows


class FarTensor(torch.Tensor):
    "Numbers on the far device."
    __torch_function__ = torch._C._disabled_torch_function_impl
    @staticmethod
    def __new__(cls, near):
        layout = dict(strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, near.size(), **layout, device=FAR, requires_grad=False)
    def __init__(self, near):
        self.near = near
    def tolist(self):
        waits("tolist")
        return self.near.tolist()
    def __repr__(self):
        return f"Far({self.near})"
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


class Waits:
    "How often the host waited; `strict` makes it an error."
    count, strict = 0, False
    def __call__(self, what):
        self.count += 1
        if self.strict:
            raise AssertionError(f"the host waits: {what}")

waits = Waits()


def call(func, args, kwargs):
    "Do it with the numbers, and say where the result is."
    name, leaves = func.overloadpacket.__name__, [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
    far = [x for x in leaves if isinstance(x, FarTensor)]
    moved = name in ("_to_copy", "to", "copy_")
    at = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)), None)
    if far and not moved:
        free = tree_leaves(args[1]) if name.startswith("index") and len(args) > 1 else []
        for x in leaves:
            if not isinstance(x, FarTensor) and x.ndim and not any(x is f for f in free):
                raise RuntimeError(f"{name}: expected tensors on the same device; {tuple(x.shape)} is on the host")
        for f in free:
            if torch.is_tensor(f) and not isinstance(f, FarTensor):
                waits(f"{name} with an index from the host")
            elif torch.is_tensor(f) and f.dtype == torch.bool:
                waits(f"{name} with a mask")
    if name in Tape.host and far:
        waits(name)
    there = bool(far) if at is None else at == FAR
    if name in ("_to_copy", "to") and at is not None and there != bool(far):
        free = there and (kwargs.get("non_blocking") or any(a is True for a in args))
        free or waits("a copy to the host" if far else "a copy from ordinary memory")
    if name == "copy_":
        there = isinstance(args[0], FarTensor)
        same = isinstance(args[0], FarTensor) == isinstance(args[1], FarTensor)
        free = there and (kwargs.get("non_blocking") or len(args) > 2 and args[2])
        same or free or waits("a copy between devices")
    wrapped = {id(x.near): x for x in far}
    near = lambda x: x.near if isinstance(x, FarTensor) else torch.device("cpu") if isinstance(x, torch.device) else x
    args, kwargs = tree_map(near, (args, kwargs))
    out = func(*args, **kwargs)
    if far and not there and moved:
        out = out.clone()  # on the host, not the same memory
    back = lambda x: wrapped[id(x)] if id(x) in wrapped else FarTensor(x) if there and torch.is_tensor(x) else x
    return tree_map(back, out)


class Elsewhere(TorchDispatchMode):
    "Within it tensors can be made on the far device and moved there."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def sent(p):
    "A weight or buffer on the far device."
    if isinstance(p, torch.nn.Parameter):
        return torch.nn.Parameter(FarTensor(p.detach()), requires_grad=False)
    return FarTensor(p)


@contextlib.contextmanager
def elsewhere(*models):
    "Within it the models' weights lie on the far device."
    tables = [table for model in models for m in model.modules() for table in (m._parameters, m._buffers)]
    tensor, kept = torch.tensor, [(table, n, p) for table in tables for n, p in table.items() if p is not None]
    def tensor_sent(*args, device=None, **kwargs):
        made = tensor(*args, **kwargs)
        return made if device is None else made.to(device)
    try:
        with torch.inference_mode():
            far = {id(p): sent(p) for *_, p in kept}
            for table, n, p in kept:
                table[n] = far[id(p)]
            torch.tensor = tensor_sent  # it would make memory there by itself
            with Elsewhere():
                yield
    finally:
        torch.tensor = tensor
        for table, n, p in kept:
            table[n] = p
