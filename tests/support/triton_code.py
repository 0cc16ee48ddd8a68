"""The code that `torch.compile` generates for a GPU, made without one; it can be read, not run."""

from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

H100 = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


def triton_code(function: Callable[..., Tensor], *inputs: Tensor) -> str:
    """Return the Python module with kernels and calls that inductor writes for an H100.

    Args:
        function: Any function of tensors.
        inputs: Tensors on the meta device, with the shapes and types of the inputs.
    """
    replaced = {
        "torch._inductor.runtime.hints.DeviceProperties.create": lambda device: H100,
        "torch.cuda.get_device_properties": lambda device: H100,
        "torch.cuda.get_device_capability": lambda: (H100.major, 0),
        "torch._inductor.scheduler.has_triton": lambda: True,
        "torch.utils._triton.triton_hash_with_backend": lambda: "",
    }
    with ExitStack() as stack:
        for name, replacement in replaced.items():
            stack.enter_context(patch(name, replacement))
        mode = stack.enter_context(FakeTensorMode())
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") for x in inputs]
        graph = GraphLowering(make_fx(lambda *each: function(*each), select_decomp_table())(*fakes), fakes)
        for context in (V.set_graph_handler(graph), V.set_fake_mode(mode), DebugContext()):
            stack.enter_context(context)
        graph.run(*fakes)
        code = graph.codegen()[0]
    return str(getattr(code, "value", code))
