"""A pretended GPU: the project runs with --device cuda on a CPU build of torch, and what CUDA would refuse is refused.

A `CudaTensor` says that it is on cuda:0 and keeps its values in a CPU tensor, its payload. For C++ it is a CPU tensor
without storage, so each operation on it, those of the backward pass too, comes to `dispatch`, which computes on the
payloads. Refused with a `DeviceError`: tensors of both devices in one operation, an index that is out of range, numpy,
a row of attention that sees nothing.

Not pretended: FSDP2 (`shard` only moves the model), NCCL (the CPU's gloo does it), several GPUs, streams, the foreach
kernels of AdamW, bfloat16 by FSDP, CUDA's own rounding, memory and speed. A copy to the CPU carries no gradient.
"""

import contextlib
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from lib import runs, training

CUDA = torch.device("cuda:0")
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
TAKES_SCALARS = {"fill_", "masked_fill", "masked_fill_"}  # beside what torch tags as pointwise
WAITS = []  # operations that made the host wait for the device


class DeviceError(RuntimeError):
    """What CUDA would refuse."""


class CudaTensor(torch.Tensor):
    """A tensor on cuda:0 whose values are in the CPU tensor `payload`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, payload):
        layout = {"strides": payload.stride(), "storage_offset": payload.storage_offset(), "dtype": payload.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, payload.shape, device="cpu", **layout)
        tensor.payload = payload
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def to(self, *args, copy=False, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return self.payload.to(dtype or self.dtype, copy=True)
        return self if dtype is None else super().to(dtype, copy=copy)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.payload.tolist()

    def __array__(self, *args, **kwargs):
        raise DeviceError("can't convert a cuda tensor to numpy")

    numpy = __array__


def change(tree, function):
    """Lists, tuples and dicts with function(x) in place of each tensor x."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([change(x, function) for x in tree])
    if isinstance(tree, dict):
        return {key: change(x, function) for key, x in tree.items()}
    return tree


def dispatch(function, args, kwargs):
    """One operation of torch, on payloads."""
    name, found = function._schema.name.split("::")[1], []

    def unwrap(tensor):
        found.append(tensor)
        return tensor.payload if isinstance(tensor, CudaTensor) else tensor

    payloads, options = [change(tree, unwrap) for tree in (args, kwargs)]
    ours = any(isinstance(x, CudaTensor) for x in found)
    if ours and not all(isinstance(x, CudaTensor) for x in found):
        refuse_two_devices(function, name, args, found)
    if ours and name in ("nonzero", "_local_scalar_dense"):
        WAITS.append(name)
    to_cuda = torch.device(options.get("device") or "cpu").type == "cuda"
    if to_cuda:
        options["device"] = "cpu"
    try:
        out = function(*payloads, **options)
    except (IndexError, RuntimeError) as error:
        if ours and ("out of range" in str(error) or "out of bounds" in str(error)):
            raise DeviceError(f"{name}: device-side assert, {error}") from error
        raise
    if function.namespace == "c10d" or not (ours or to_cuda):
        return out
    if not ours:
        return change(out, CudaTensor)
    if name == "copy_" and not isinstance(args[0], CudaTensor):
        return args[0]
    return return_and_correct_aliasing(function, args, kwargs, change(out, CudaTensor))


def refuse_two_devices(function, name, args, tensors):
    """Raises DeviceError unless CUDA takes the tensors that are on the CPU beside those on cuda."""
    on_cpu = [x for x in tensors if not isinstance(x, CudaTensor)]
    if name in ("copy_", "_to_copy"):
        on_cpu = []
    elif name in INDEXING:  # an index may be on the CPU; what is indexed and new values may not
        on_cpu = [x for x in on_cpu if any(x is y for y in (args[0], *args[2:3]))]
    if torch.Tag.pointwise in function.tags or name in TAKES_SCALARS | INDEXING:
        on_cpu = [x for x in on_cpu if x.dim()]
    if on_cpu:
        raise DeviceError(f"{name}: tensors of two devices, on the CPU {[tuple(x.shape) for x in on_cpu]}")


class Operations(TorchDispatchMode):
    """Sees what is made on cuda and what is moved there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Sees the device of torch.tensor and the mask of attention, which no operation has as they were given."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return CudaTensor(function(*args, **{**kwargs, "device": "cpu"}))
        mask = kwargs.get("attn_mask") if function is F.scaled_dot_product_attention else None
        if mask is not None and not (mask == 0).any(-1).all().tolist():  # 0 on the CPU, perhaps NaN on cuda
            raise DeviceError("attention: a row of the mask sees nothing")
        return function(*args, **kwargs)


def move_module(module, device, to=torch.nn.Module.to):
    """nn.Module.to; tied parameters stay tied."""
    if torch.device(device).type == "cpu":
        return to(module, device)
    moved = {None: None}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor not in moved:
                    moved[tensor] = CudaTensor(tensor.detach().clone())
                    if isinstance(tensor, torch.nn.Parameter):
                        moved[tensor] = torch.nn.Parameter(moved[tensor], tensor.requires_grad)
                tensors[name] = moved[tensor]
    return module


def shard(root, lm, dtype, world, shard_size):
    """In place of FSDP2."""
    root.reshard = lambda: None
    return root.to(world.device)


@contextlib.contextmanager
def simulated_cuda():
    """Inside, torch has one GPU. Yields the mock of torch.backends.cuda.enable_cudnn_sdp."""
    runs.start_processes("cpu", 1)  # the process group: gloo, not NCCL
    nothing = ("set_device", "_lazy_init", "empty_cache", "is_current_stream_capturing", "max_memory_allocated")
    cuda = dict.fromkeys(nothing, 0) | {"is_available": True, "device_count": 1, "current_device": 0}
    cuda |= {"is_bf16_supported": True, "get_device_capability": (9, 0), "current_stream": mock.Mock()}
    cuda["stream"] = contextlib.nullcontext()
    with (
        mock.patch.multiple(torch.cuda, **{name: mock.Mock(return_value=value) for name, value in cuda.items()}),
        mock.patch.object(torch.nn.Module, "to", move_module),
        mock.patch.object(training, "shard", shard),
        mock.patch.object(torch.backends.cuda, "enable_cudnn_sdp") as enable_cudnn_sdp,
        Functions(),
        Operations(),
    ):
        yield enable_cudnn_sdp
