"""Networks on a CPU: OpenVINO gives PyTorch's answers, and PyTorch stands in wherever OpenVINO does not."""

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import utils
from lumbar import engine
from lumbar.__main__ import main
from lumbar.engine import on_cpu
from lumbar.in_flight import can_run_in_child, run_in_child
from lumbar.limits import TookTooLong
from lumbar.spine.spinenet import SpineNet

has_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


@pytest.fixture(autouse=True)
def chosen_by_itself(monkeypatch):
    monkeypatch.delenv("LUMBAR_ENGINE", raising=False)
    monkeypatch.setattr(engine, "_PAYS_AFTER_S", 0.0)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()


def images(*shape, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


class Broken(ModuleType):
    """An openvino that cannot do anything."""

    def __getattr__(self, name):
        raise RuntimeError("no such\ninstruction")


class Wrong(ModuleType):
    """An openvino that answers, but not what the network does."""

    class Core:
        def compile_model(self, model, device, settings):
            return self

        def create_infer_request(self):
            return self

        def infer(self, inputs):
            return [np.zeros((1, 2, 8, 8), np.float32)]


@pytest.mark.parametrize("openvino", [Broken("openvino"), Wrong("openvino")])
@torch.no_grad()
def test_pytorch_stands_in_with_one_line(openvino, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.setattr(engine, "_converted", lambda traced, example: openvino.Core())
    network, x = small(), images(1, 1, 8, 8)
    for _ in range(3):
        assert torch.equal(on_cpu(network, x)(x), network(x))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("OpenVINO cannot run Sequential here, PyTorch does (RuntimeError: ")


class Dying:
    """A compiled network that works once, when it is tried."""

    def __init__(self, module):
        self.process, self.module, self.left = os.getpid(), module, 1

    def __call__(self, x):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("could not execute a primitive")
        return self.module(x)


@torch.no_grad()
def test_pytorch_goes_on_where_openvino_fails_later(monkeypatch, capsys):
    monkeypatch.setattr(engine, "_compiled", lambda network, module, example: Dying(module))
    network, x = small(), images(1, 1, 8, 8)
    forward = on_cpu(network, x)
    for _ in range(3):  # the same callable, then one asked for anew
        assert torch.equal(forward(x), network(x))
    assert on_cpu(network, x) is network
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "OpenVINO cannot run Sequential here, PyTorch does (RuntimeError: could not execute a primitive)"


@torch.no_grad()
def test_what_stops_a_study_is_no_failure_of_the_engine(monkeypatch, capsys):
    def late(x):
        raise TookTooLong("45 s")

    late.process = os.getpid()
    monkeypatch.setattr(engine, "_compiled", lambda *_: late)
    network, x = small(), images(1, 1, 8, 8)
    with pytest.raises(TookTooLong):
        on_cpu(network, x)(x)
    assert on_cpu(network, x) is not network and not capsys.readouterr().out


@torch.no_grad()
def test_an_engine_that_does_not_exist_stops_the_start(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LUMBAR_ENGINE", "tensorrt")
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "LUMBAR_ENGINE is 'tensorrt'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="LUMBAR_ENGINE"):
        utils.start_notebook([], {})
    monkeypatch.setenv("LUMBAR_ENGINE", "openvino")
    monkeypatch.setattr(engine, "_compiled", lambda network, module, example: Dying(module))
    network = small()
    assert on_cpu(network, images(1, 1, 8, 8)) is not network


@torch.no_grad()
def test_without_openvino_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    network, x = small(), images(1, 1, 8, 8)
    assert on_cpu(network, x) is network
    assert on_cpu(network, x, nn.Sequential)(x).shape == (1, 2, 8, 8) and not capsys.readouterr().out


def test_what_is_not_for_openvino(monkeypatch):
    monkeypatch.setattr(engine, "_compiled", lambda *_: pytest.fail("compiled"))
    x = images(1, 1, 8, 8)
    training = small().train()
    assert on_cpu(training, x) is training
    elsewhere = small().to("meta")
    assert on_cpu(elsewhere, x) is elsewhere
    monkeypatch.setenv("LUMBAR_ENGINE", "torch")
    network = small()
    assert on_cpu(network, x) is network
    monkeypatch.setenv("LUMBAR_ENGINE", "tensorrt")
    with pytest.raises(ValueError, match="LUMBAR_ENGINE is 'tensorrt': auto or torch"):
        on_cpu(network, x)


@torch.no_grad()
def test_a_network_is_compiled_when_it_has_worked_for_as_long_as_that_takes(monkeypatch):
    compiled, clock = [], iter(range(100))
    monkeypatch.setattr(engine, "_compiled", lambda network, *_: compiled.append(network))
    monkeypatch.setattr(engine, "_PAYS_AFTER_S", 3.0)
    monkeypatch.setattr(engine.time, "thread_time", lambda: next(clock))  # a second a run
    network, x = small(), images(1, 1, 8, 8)
    for runs in range(1, 6):
        assert torch.equal(on_cpu(network, x)(x), network(x))
        assert compiled == [network] * (runs > 3)


@has_openvino
@torch.no_grad()
def test_openvino_gives_the_same_for_any_size():
    torch.manual_seed(0)
    network = SpineNet((8, 8)).eval()
    forward = on_cpu(network, images(1, 1, 20, 24))
    assert isinstance(forward, engine._Guarded)
    for shape in ((1, 1, 20, 24), (3, 1, 33, 21), (1, 1, 8, 8)):
        x = images(*shape)
        found = forward(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-4)


@has_openvino
@torch.no_grad()
def test_it_is_compiled_once_and_again_with_other_weights():
    network, x = small(), images(1, 1, 8, 8)
    forward = on_cpu(network, x)
    assert on_cpu(network, x).engine is forward.engine
    network.load_state_dict(small(seed=5).state_dict())
    changed = on_cpu(network, x)
    assert changed.engine is not forward.engine
    torch.testing.assert_close(changed(x), network(x), rtol=1e-4, atol=1e-5)


@has_openvino
@torch.no_grad()
def test_threads_do_not_mix_up_their_answers():
    network = small()
    forward = on_cpu(network, images(1, 1, 8, 8))
    inputs = [images(1 + k % 3, 1, 16, 16, seed=k) for k in range(24)]
    with ThreadPoolExecutor(4) as pool:
        for x, found in zip(inputs, pool.map(forward, inputs), strict=True):
            torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-5)


@has_openvino
@pytest.mark.skipif(not can_run_in_child(), reason="no fork here")
@torch.no_grad()
def test_a_forked_child_does_not_wait_for_threads_that_it_lacks():
    network, x = small(), images(1, 1, 8, 8)
    assert on_cpu(network, x) is not network
    found = run_in_child(lambda: on_cpu(network, x)(x).flatten().tolist(), 30.0)
    np.testing.assert_allclose(found, network(x).flatten(), rtol=1e-5)


@has_openvino
def test_nothing_is_reported_to_anybody(monkeypatch):
    """openvino.convert_model would tell its makers of every call."""
    sent = []
    telemetry = pytest.importorskip("openvino_telemetry")
    monkeypatch.setattr(telemetry.Telemetry, "send_event", lambda *given, **named: sent.append(given))
    network = torch.nn.Conv2d(1, 2, 3).eval()
    assert engine._compiled(network, network, images(1, 1, 8, 8)) is not None and not sent
