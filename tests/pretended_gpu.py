"""A pretended GPU: tensors that say cuda:0, are computed on the CPU, and refuse what CUDA refuses.

    python tests/pretended_gpu.py train.py --data_root sample --architecture tiny --epochs 1

It finds, on a machine without a GPU, what fails in the first run on one: a tensor that stayed on
the CPU, `.numpy()` of one that is on the device, a file that is bound to the device. Numbers are
those of the CPU.

Under autocast the operations that Python calls have the types that CUDA gives them.

What it does not show: CUDA's own kernels and their rounding, torch.compile, streams, memory, speed,
work in other threads, more than one GPU.

How. An `OnGpu` is a tensor of two sides. To torch's C++ it is a tensor without memory (of the meta
device, for which autograd asks no driver), to Python one on cuda:0; `inner` is the CPU tensor with
the numbers. Every operation passes through `Operations`, which checks it by CUDA's rules and
computes it with the inner tensors.
"""

import contextlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")

# -----------------------------------------------------------------------------
# CUDA's rules, by the names of torch's operations

COPIES = {"_to_copy", "copy_", "_local_scalar_dense", "set_"}
# A GPU tensor may be indexed by CPU tensors; what is written into it must be on the GPU.
INDEXED = {"index", "_unsafe_index"}
WRITTEN = {"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# Like all pointwise operations, these take a CPU tensor of no dimension for a number.
TAKES_NUMBERS = {"masked_fill", "masked_fill_", "fill", "fill_", "index_fill", "index_fill_"}
# CUDA multiplies no matrices of whole numbers.
MATRIX_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot"}
# CUDA has these for floating-point numbers only.
OF_FLOATS = {
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "upsample_bicubic2d",
    "reflection_pad2d",
    "avg_pool2d",
}

# Under autocast: what torch documents of CUDA, by the names of the functions that Python calls.
IN_HALF = set(
    "__matmul__ __rmatmul__ addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm mv prelu "
    "multi_head_attention_forward scaled_dot_product_attention".split()
)
IN_FULL = set(
    "__pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cdist cosh "
    "cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm kl_div "
    "l1_loss layer_norm log log10 log1p log2 log_softmax mse_loss nll_loss norm normalize pow prod "
    "reciprocal rsqrt sinh smooth_l1_loss softmax softplus sum tan".split()
)


def check_operation(function, args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError, as CUDA does, for an operation that it would refuse.

    function: an overload such as aten.add.Tensor. At least one of the arguments is on the GPU.
    """
    name = function.overloadpacket.__name__
    if name in INDEXED | WRITTEN:
        check_index(name, *args)
    elif name not in COPIES:
        check_same_device(function, args, kwargs)
    check_generator(args, kwargs)
    check_dtypes(name, args)


def check_same_device(function, args: tuple, kwargs: dict) -> None:
    """All tensors must be on the GPU, but for numbers that are only read."""
    name = function.overloadpacket.__name__
    takes_numbers = torch.Tag.pointwise in function.tags or name in TAKES_NUMBERS
    takes_numbers = takes_numbers or name.startswith("_foreach_")
    on_cpu = [tensor for tensor in tensors_in(args, kwargs) if not isinstance(tensor, OnGpu)]
    if any(not takes_numbers or tensor.dim() > 0 for tensor in on_cpu):
        raise mixed_devices(name, args, kwargs)
    if on_cpu and not all(isinstance(t, OnGpu) for t in written_tensors(function, args, kwargs)):
        raise mixed_devices(name, args, kwargs)


def check_index(name: str, tensor: torch.Tensor, indices, *values) -> None:
    """Indices may be on the CPU, unless the tensor is; values must be where the tensor is."""
    if not isinstance(tensor, OnGpu) and any(isinstance(i, OnGpu) for i in indices):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        )
    for value in tensors_in(values):
        if value.dim() > 0 and isinstance(value, OnGpu) != isinstance(tensor, OnGpu):
            raise mixed_devices(name, (tensor, *values))


def check_generator(args: tuple, kwargs: dict) -> None:
    """Random numbers of the GPU come from a generator of the GPU."""
    for value in leaves((args, kwargs)):
        if isinstance(value, torch.Generator) and value.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def check_dtypes(name: str, args: tuple) -> None:
    """Some kernels are written for floating-point numbers only."""
    dtypes = {tensor.dtype for tensor in tensors_in(args)}
    if name in MATRIX_PRODUCTS | OF_FLOATS and not all(d.is_floating_point for d in dtypes):
        raise RuntimeError(f'"{name}_cuda" not implemented for {dtypes}')


def mixed_devices(name: str, *arguments) -> RuntimeError:
    found = [f"{tensor.device} {tuple(tensor.shape)}" for tensor in tensors_in(*arguments)]
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices: "
        f"{name} of {', '.join(found)}"
    )


def tensors_in(*arguments) -> list[torch.Tensor]:
    """All tensors in arguments, also those in lists, tuples and dicts."""
    return [value for value in leaves(arguments) if isinstance(value, torch.Tensor)]


def leaves(value) -> Iterator:
    """All values in nested lists, tuples and dicts."""
    # Torch's own tree_flatten and tree_map know more, and take ten times as long.
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def replaced(value, function):
    """The same nested lists, tuples and dicts with function(leaf) in place of each leaf."""
    if isinstance(value, (list, tuple)):
        return type(value)([replaced(part, function) for part in value])
    if isinstance(value, dict):
        return {key: replaced(part, function) for key, part in value.items()}
    return function(value)


def written_tensors(function, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that an operation changes: the first of `add_`, the `out` of `add`."""
    written = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return tensors_in(written)


# -----------------------------------------------------------------------------
# tensors and operations


class OnGpu(torch.Tensor):
    """A tensor that says cuda:0; `inner` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        outer = torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device="meta")
        tensor = torch.Tensor._make_subclass(cls, outer, False, device_for_backend_keys=CUDA)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    # What C++ would answer for the meta device.
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "OnGpu") -> None:
        torch.Tensor.data.__set__(self, value)  # its C++ side
        self.inner = value.inner

    def get_device(self) -> int:
        return CUDA.index

    def to(self, *args, copy: bool = False, **kwargs) -> torch.Tensor:
        """As Tensor.to: the tensor itself where there is nothing to do."""
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        stays = device is None or is_gpu(device)
        if stays and dtype in (None, self.dtype) and layout is None and not copy:
            return self
        words = {"copy": copy} | ({"memory_format": layout} if layout is not None else {})
        return super().to(CUDA if stays else device, dtype or self.dtype, **words)

    def cpu(self) -> torch.Tensor:
        return self.to(CPU)

    def cuda(self, *_, **__) -> torch.Tensor:
        return self

    def numpy(self, *_, **__):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy

    def pin_memory(self, *_):
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"


def is_gpu(device) -> bool:
    """Whether a device that C++ is asked for is the GPU: to autograd an OnGpu is of meta."""
    return device is not None and torch.device(device).type in ("cuda", "meta")


def compute(function, args: tuple, kwargs: dict):
    """An operation in which the GPU takes part, with the inner tensors."""
    gpu_tensors = [tensor for tensor in tensors_in(args, kwargs) if isinstance(tensor, OnGpu)]
    device = kwargs.get("device")
    check_operation(function, args, kwargs)

    # The same on the CPU.
    inner_args, inner_kwargs = replaced((args, kwargs), inner_of)
    if is_gpu(device):
        inner_kwargs["device"] = CPU
    for word in ("non_blocking", "pin_memory"):  # a CPU alone has neither
        inner_kwargs.pop(word, None)
    results = function(*inner_args, **inner_kwargs)

    # Each result is a tensor of the GPU, unless it was asked for elsewhere.
    if device is not None and not is_gpu(device):
        return results  # a copy on the CPU

    def outer_of(result):
        if not isinstance(result, torch.Tensor):
            return result
        for tensor in gpu_tensors:
            if result is tensor.inner:  # changed in place: the same tensor as before
                return checked_shape(tensor)
        return OnGpu(result)

    return replaced(results, outer_of)


def inner_of(value):
    return value.inner if isinstance(value, OnGpu) else value


def checked_shape(tensor: OnGpu) -> OnGpu:
    """Raise NotImplementedError if its inner tensor was given another shape in place."""
    if tensor.shape != tensor.inner.shape or tensor.stride() != tensor.inner.stride():
        raise NotImplementedError("a pretended GPU can't change the shape of a tensor in place")
    return tensor


class Operations(TorchDispatchMode):
    """Computes every operation of GPU tensors, and those that make or copy tensors to the GPU."""

    def __init__(self, calls: "Calls"):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        has_gpu_tensor = any(isinstance(tensor, OnGpu) for tensor in tensors_in(args, kwargs))
        asks_for_gpu = is_gpu(kwargs.get("device")) and not self.calls.want_meta
        if has_gpu_tensor or asks_for_gpu:
            return compute(function, args, kwargs)
        return function(*args, **kwargs)


class Calls(TorchFunctionMode):
    """Changes what the script itself calls, before C++ sees it.

    want_meta: whether the script asks for the meta device, and not autograd for an OnGpu.
    """

    want_meta = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.device:
            return function(*args, **kwargs)
        # C++ would ask the driver which GPU `cuda` is.
        args = [with_number(value) for value in args]
        kwargs = {word: with_number(value) for word, value in kwargs.items()}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == CUDA:
            # No mode sees how C++ makes these: on the CPU first.
            del kwargs["device"]
            return function(*replaced(args, as_number), **kwargs).to(CUDA)
        if function is torch.Tensor.cuda:
            return args[0].to(CUDA)
        if torch.is_autocast_enabled("cuda"):
            cast = autocast_of(function.__name__)
            args, kwargs = replaced(args, cast), replaced(kwargs, cast)
        # Those of autograd for an OnGpu come from C++ and never pass here.
        values = [*args, *kwargs.values()]
        asks_for_meta = any(is_meta_device(value) for value in values)
        if not asks_for_meta or any(isinstance(value, OnGpu) for value in values):
            return function(*args, **kwargs)
        with mock.patch.object(self, "want_meta", True):
            return function(*args, **kwargs)


def autocast_of(name: str) -> Callable:
    """What autocast does with the arguments of a function."""
    low = torch.get_autocast_dtype("cuda")

    def cast(value):
        if not isinstance(value, OnGpu) or not value.is_floating_point():
            return value
        if name in IN_HALF and value.dtype != torch.float64:
            return value.to(low)
        if name in IN_FULL and value.dtype == low:
            return value.float()
        return value

    return cast


def with_number(value):
    is_cuda = isinstance(value, torch.device) and value.type == "cuda" and value.index is None
    is_name = isinstance(value, str) and value == "cuda"
    return CUDA if is_cuda or is_name else value


def as_number(value):
    return value.item() if isinstance(value, OnGpu) and value.dim() == 0 else value


def is_meta_device(value) -> bool:
    is_device = isinstance(value, torch.device) and value.type == "meta"
    return is_device or isinstance(value, str) and value == "meta"


# -----------------------------------------------------------------------------
# the rest of torch


class Stream:
    """A stream or an event: here everything is done when it is asked for."""

    def __init__(self, *_, **__):
        pass

    def do_nothing(self, *_, **__) -> None:
        pass

    record = wait = wait_stream = wait_event = synchronize = do_nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Stream") -> float:
        return 0.0


def as_cpp(function, args: tuple, kwargs: dict):
    """The result of an operation that C++ asks for, and not the script: past `Calls`."""
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


class Graph:
    """A CUDA graph: operations that are repeated on the memory that they were recorded with."""

    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, results in self.operations:
            made_memory = not any(returned.alias_info for returned in function._schema.returns)
            again = as_cpp(function, args, kwargs)
            if made_memory:  # else it was written into what it was given, or is a view of it
                for old, new in zip(tensors_in(results), tensors_in(again)):
                    old.copy_(new)


class recording(TorchDispatchMode):
    """torch.cuda.graph: records what is computed within the block, and lets nobody wait for it."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = as_cpp(function, args, kwargs)
        read = function.overloadpacket.__name__ == "_local_scalar_dense"
        if read or len({str(tensor.device) for tensor in tensors_in(args, results)}) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.graph.operations.append((function, args, kwargs, results))
        return results


def constant(value):
    return lambda *_, **__: value


GIB = 2**30
ANSWERS = {
    "_lazy_init": constant(None),
    "empty_cache": constant(None),
    "synchronize": constant(None),
    "reset_peak_memory_stats": constant(None),
    "set_device": constant(None),
    "manual_seed": constant(None),
    "manual_seed_all": constant(None),
    "is_available": constant(True),
    "is_initialized": constant(True),
    "is_bf16_supported": constant(True),
    "is_current_stream_capturing": constant(False),
    "device_count": constant(1),
    "current_device": constant(0),
    "get_device_name": constant("a pretended GPU"),
    "get_device_capability": constant((9, 0)),
    "mem_get_info": constant((70 * GIB, 80 * GIB)),
    "max_memory_allocated": constant(0),
    "memory_allocated": constant(0),
    "Stream": Stream,
    "Event": Stream,
    "stream": constant(contextlib.nullcontext()),
    "CUDAGraph": Graph,
    "graph": recording,
    "current_stream": constant(Stream()),
}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within the block this machine has a GPU, cuda:0."""
    calls = Calls()
    with contextlib.ExitStack() as patches:
        for name, answer in ANSWERS.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answer))
        generators = (torch.Generator(),)
        for owner, name, value in [
            (torch.cuda, "default_generators", generators),
            (torch.cuda.amp.common, "amp_definitely_not_available", constant(False)),
            (torch.Tensor, "pin_memory", lambda tensor, *_: tensor),
            # Tensors of inference mode can't be given two sides.
            (torch.inference_mode, "__enter__", enter_no_grad),
            (torch.inference_mode, "__exit__", exit_no_grad),
            (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", constant(None)),
            (torch, "save", save),
            (torch.autograd, "_engine_run_backward", backward_of(calls)),
        ]:
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(new_parameters_when_moved())
        patches.enter_context(Operations(calls))
        patches.enter_context(calls)
        yield


def backward_of(calls: Calls) -> Callable:
    """The backward pass, in which blocks that are recomputed call Python again."""
    engine = torch.autograd._engine_run_backward

    def backward(*args, **kwargs):
        with calls:
            return engine(*args, **kwargs)

    return backward


def enter_no_grad(self) -> None:
    self.grad_mode = torch.set_grad_enabled(torch.is_grad_enabled() and not self.mode)
    self.grad_mode.__enter__()


def exit_no_grad(self, *error) -> None:
    self.grad_mode.__exit__(*error)


@contextlib.contextmanager
def new_parameters_when_moved() -> Iterator[None]:
    """Module.to makes new parameters: written into the old ones, `inner` would be lost."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


plain_save = torch.save


def save(state, *args, **kwargs) -> None:
    """torch.save, which writes into the file that its GPU tensors are of cuda:0."""
    tensors = [tensor for tensor in tensors_in(state) if isinstance(tensor, OnGpu)]
    places = {tensor.inner.untyped_storage().data_ptr() for tensor in tensors}

    def tag(storage) -> str | None:
        return str(CUDA) if storage.data_ptr() in places else None

    registry = torch.serialization._package_registry
    entry = (0, tag, constant(None))  # before all others
    registry.insert(0, entry)
    try:
        plain = replaced(state, lambda v: v.inner.detach() if isinstance(v, OnGpu) else v)
        plain_save(plain, *args, **kwargs)
    finally:
        registry.remove(entry)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    with pretended_gpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
