"""Networks on a CPU: by OpenVINO where it is installed, else by PyTorch.

May use: limits.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .limits import TookTooLong

# The same float32 arithmetic in fewer steps: batch norms folded into convolutions, kernels chosen for the processor.
# bfloat16 would be faster still where the hardware has it, but changes the maps by up to 0.2; so it is never used.
_PRECISION = "f32"
_TOLERANCE = 1e-3  # of the largest value, by which the first answer may differ from PyTorch's
_MOST_STREAMS = 4  # inferences at a time, as inference has at most so many readers

ENGINES = ("auto", "openvino", "torch")  # what LUMBAR_ENGINE may say; openvino is auto, by name

_lock = threading.Lock()
# Network -> its tensors, what they were when it was compiled, and the engine: None where OpenVINO cannot run it.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[list[torch.Tensor], list[tuple[int, int]], _Compiled | None]] = (
    weakref.WeakKeyDictionary()
)

_worked_s: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()  # by PyTorch
# To compile a network takes 2 to 5 s of CPU. It is done once PyTorch has worked on it for as long: then it costs at
# most as much again, and a short run nothing.
_PAYS_AFTER_S = 4.0


def on_cpu(
    network: nn.Module, example: torch.Tensor, wrap: Callable[[nn.Module], nn.Module] = lambda network: network
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The fastest way to run a network here, with the same results up to rounding.

    OpenVINO, if it is installed and the network is on a CPU and in eval mode; else, and where OpenVINO fails, which is
    printed, the network itself. It is compiled once there is enough to do, and again when its weights have changed;
    the environment variable LUMBAR_ENGINE=torch switches that off.

    Parameters
    ----------
    network : nn.Module
    example : Tensor
        An input; others may differ in every axis that the network leaves open.
    wrap : callable
        From the network to the module to be run, of one input and one output tensor.

    Returns
    -------
    callable
        From a float32 Tensor to the output Tensor, for threads too. Call it without gradients.
    """
    module = wrap(network)
    if not _is_wanted(network):
        return module
    if _worked_s.get(network, 0.0) < _PAYS_AFTER_S:
        return _timed(network, module)
    with _lock:
        known, tensors = _known.get(network), [*network.parameters(), *network.buffers()]
        if known is None or known[1] != _state_of(tensors):
            engine = _compiled(network, module, example)
            _known[network] = known = tensors, _state_of(tensors), engine
        engine = known[2]
    return _Guarded(network, module, engine) if engine is not None and engine.process == os.getpid() else module


_folded: weakref.WeakKeyDictionary[nn.Module, tuple[list[torch.Tensor], list[tuple[int, int]], nn.Module]] = (
    weakref.WeakKeyDictionary()
)


def folded(network: nn.Module) -> Any:
    """A copy of a network for inference, with batch norms folded into the convolutions before them.

    The same results up to rounding. In training mode, where batch norms do more, the network itself; else one copy
    until the weights change, as PyTorch counts it: not through `.data`, nor by an optimiser with fused=True.

    Parameters
    ----------
    network : nn.Module
        Folded are convolutions that a batch norm follows in an nn.Sequential.

    Returns
    -------
    nn.Module
        Of the same class, on the same device.
    """
    if any(module.training for module in network.modules()):
        return network
    tensors = [*network.parameters(), *network.buffers()]
    if any(tensor.is_inference() for tensor in tensors):  # of which PyTorch does not count the changes
        return _folded_copy(network)
    with _lock:
        known = _folded.get(network)
        if known is None or known[1] != _state_of(tensors):
            _folded[network] = known = tensors, _state_of(tensors), _folded_copy(network)
    return known[2]


def _folded_copy(network):
    copy = deepcopy(network).requires_grad_(False)
    for module in list(copy.modules()):
        _fold(module)
    return copy


def _fold(sequence: nn.Module) -> None:
    """Fold the batch norms of an nn.Sequential's own layers, in place."""
    if not isinstance(sequence, nn.Sequential):
        return
    for number, (layer, following) in enumerate(itertools.pairwise(list(sequence))):
        if isinstance(layer, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            sequence[number], sequence[number + 1] = fuse_conv_bn_eval(layer, following), nn.Identity()


class _Guarded:
    """A compiled module with the network itself behind it: for this input and all later ones, once OpenVINO fails."""

    def __init__(self, network: nn.Module, module: nn.Module, engine: _Compiled) -> None:
        self.network, self.module, self.engine = network, module, engine

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.engine(x)
        except TookTooLong:
            raise
        except Exception as error:
            with _lock:
                tensors, state, known = _known[self.network]
                _known[self.network] = tensors, state, None
            if known is not None:  # the first of several threads
                _say_why_not(self.network, error)
            return self.module(x)


def check_engine() -> None:
    """Raise ValueError for a LUMBAR_ENGINE that does not exist, before anything runs."""
    wanted = os.environ.get("LUMBAR_ENGINE", "auto")
    if wanted not in ENGINES:
        raise ValueError(f"LUMBAR_ENGINE is {wanted!r}: auto or torch (openvino is auto)")


def _timed(network: nn.Module, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module, which enters how long it worked."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        started = time.thread_time()
        try:
            return module(x)
        finally:
            with _lock:
                _worked_s[network] = _worked_s.get(network, 0.0) + time.thread_time() - started

    return forward


def _is_wanted(network: nn.Module) -> bool:
    """Whether OpenVINO may run a network: see on_cpu. Raises ValueError for a LUMBAR_ENGINE that does not exist."""
    check_engine()
    wanted = os.environ.get("LUMBAR_ENGINE", "auto") != "torch"
    first = next(iter(network.parameters()), None)
    return wanted and first is not None and first.device.type == "cpu" and not network.training


def _state_of(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Where tensors lie and how often they were written: changes with what they hold."""
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _compiled(network: nn.Module, module: nn.Module, example: torch.Tensor) -> _Compiled | None:
    """The module by OpenVINO; None where that is not installed, or fails, which is printed."""
    try:
        import openvino
    except ModuleNotFoundError:
        return None
    except Exception as error:
        _say_why_not(network, error)
        return None
    try:
        with torch.no_grad():
            expected = module(example)  # first, for some networks make what they need when they are first run
            engine = _Compiled(openvino, module, example)
            found = engine(example)
        if not (found - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp(min=1):
            raise RuntimeError("its answer is not PyTorch's")
        return engine
    except Exception as error:
        _say_why_not(network, error)
        return None


def _say_why_not(network: nn.Module, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"OpenVINO cannot run {type(network).__name__} here, PyTorch does ({reason[:300]})")


def _converted(traced: Any, example: torch.Tensor) -> Any:
    """A traced module as OpenVINO's model. By the front end itself: openvino.convert_model does the same, but sends
    usage telemetry without asking where openvino-telemetry is installed."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    manager = FrontEndManager()
    frontend = manager.load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=example)  # has to live until all is converted
    return frontend.convert(frontend.load(decoder))


class _Compiled:
    """A module compiled by OpenVINO, as a function of a Tensor; of this process alone, its threads do not outlive a
    fork."""

    def __init__(self, openvino: Any, module: nn.Module, example: torch.Tensor) -> None:
        self.process, self.own = os.getpid(), threading.local()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing, whose own check would run the module twice more
            traced = torch.jit.trace(module, example, check_trace=False)
            model = _converted(traced, example)
        # As many threads for one inference as PyTorch would take, and as many inferences at a time as then find cores.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(torch.get_num_threads(), cores)
        streams = max(1, min(cores // threads, _MOST_STREAMS))
        self.compiled = openvino.Core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _PRECISION,
                "INFERENCE_NUM_THREADS": threads * streams,
                "NUM_STREAMS": streams,
                "ENABLE_CPU_PINNING": False,  # other processes use these cores, too
            },
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        request = getattr(self.own, "request", None)
        if request is None:
            request = self.own.request = self.compiled.create_infer_request()
        return torch.from_numpy(request.infer([x.contiguous().numpy()])[0])
