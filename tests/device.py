"""A device that is not there, for tests: `meta` to all who ask, its tensors' numbers computed on the CPU.

    with Device() as device:  # or Device(float64=False), as MPS has it
        ...                   # device.waits: what made the host wait

It notes what a CUDA device would wait for: numbers read back, and copies from the host that are not
`non_blocking`, also of what torch.tensor(..., device=...) makes. Without float64, making one there is a
TypeError.
"""

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

READS = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "unique_dim", "_unique2",
         "masked_select", "bincount"}


class There(torch.Tensor):
    """A tensor on the device; `here`: its numbers."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(),
                                                   storage_offset=here.storage_offset(),
                                                   dtype=here.dtype, device="meta")

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of its Device")


class Device(TorchDispatchMode):
    def __init__(self, float64=True):
        super().__init__()
        self.float64, self.waits = float64, []

    def wait(self, what):
        place = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_stack()
                 if "/torch/" not in f.filename]
        self.waits.append(f"{what} at {place[-3]}")

    def there(self, here):
        if here.dtype == torch.float64 and not self.float64:
            raise TypeError("the device has no float64")
        return There(here)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        given = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
        on = any(isinstance(v, There) for v in given)
        to = kwargs.get("device")
        # torch.tensor(..., device="meta")
        if any(v.device.type == "meta" and not isinstance(v, There) for v in given):
            self.wait("a tensor made of the host's numbers")
            raise RuntimeError(self.waits[-1])
        if on and (name in READS or name == "index" and any(v.dtype == torch.bool for v in given[1:])):
            self.wait(name)
        moves = to is not None and (torch.device(to).type == "meta") != on
        if name == "_to_copy" and moves and not kwargs.get("non_blocking"):
            self.wait("a copy")
        if name == "copy_" and isinstance(args[0], There) != isinstance(args[1], There) and args[1].dim() > 0:
            self.wait("a copy") if not (len(args) > 2 and args[2]) else None
        if to is not None and torch.device(to).type == "meta":
            kwargs["device"], on = torch.device("cpu"), True
        elif to is not None and name == "_to_copy":
            on = False
        here = tree_map(lambda v: v.here if isinstance(v, There) else v, (args, kwargs))
        known = {id(v.here): v for v in given if isinstance(v, There)}
        numbers = [v for v in tree_flatten(here)[0] if isinstance(v, torch.Tensor) and v.dim()]
        if on and not self.float64 and any(v.dtype == torch.float64 for v in numbers):
            raise TypeError("float64 on a device without it")
        out = func(*here[0], **here[1])

        def back(v):
            if not isinstance(v, torch.Tensor) or not on:
                return v
            return known.get(id(v)) if id(v) in known else self.there(v)

        return tree_map(back, out)
