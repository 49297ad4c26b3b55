"""What a CUDA graph does, on any machine: the operations of a run are noted and repeated on the same memory.

Most mistakes with graphs are not about CUDA: a number that Python computed is frozen, a tensor was replaced by another,
something needed the host. A tape makes the same mistakes, no faster than the function itself.
"""
from collections.abc import Callable

import torch
from tita.core import TitaError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape(TorchDispatchMode):
    "Notes the operations that run within it, as a CUDA graph does. Raises `TitaError` for one that needs the host."
    host = set("_local_scalar_dense item is_nonzero equal allclose nonzero argwhere masked_select".split())
    host |= {"_unique2", "lift_fresh", "_pin_memory"}  # results or inputs of all these are ordinary memory
    def __init__(self):
        super().__init__()
        self.done = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        indices = tree_leaves(args[1:2]) if name.startswith("index") else []
        if name in self.host or any(torch.is_tensor(x) and x.dtype == torch.bool for x in indices):
            raise TitaError(f"{name} needs the host; a graph cannot hold it")
        out = func(*args, **kwargs)
        memory = lambda x: x.detach() if torch.is_tensor(x) else x  # as it is now: a parameter may get another
        self.done.append((func, *tree_map(memory, (args, kwargs)), out))
        return out

    def replay(self):
        "Do it again, every result into the memory that it had."
        for func, args, kwargs, out in self.done:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if torch.is_tensor(old) and not same_memory(old, new):
                    old.copy_(new)


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def record_tape(f: Callable, inputs: list[Tensor]) -> tuple[Callable, list[Tensor], Tensor]: # as for `record_cuda`
    "Record a function on a `Tape`."
    inputs, tape = [x.clone() for x in inputs], Tape()
    with tape:
        out = f(*inputs)
    return tape.replay, inputs, out
