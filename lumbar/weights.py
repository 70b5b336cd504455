"""What a weights file may state: it describes a network in checked words and numbers, and runs nothing.

Anybody can write such a file and a disk can damage it. So nothing in it is evaluated, no network is larger than the
tensors that come with it, and no number is used that is not a number. Weights are written once: what is chosen later
lies beside them.

May use: storage.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, overload

from .storage import DamagedFile, file_digest, plain, read_json, read_tensors, write_json

if TYPE_CHECKING:
    import torch


def read_weights(
    path: str | Path, key: str, remedy: str, whose: str = "the kit's"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state dict, about) of a weights file of the kit; arguments and errors as of storage.open_tensors.

    Also raises DamagedFile for a tensor that holds something that is not finite.
    """
    import torch

    state, about = read_tensors(path, key, remedy, whose=whose)
    for name, value in state.items():
        if not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise DamagedFile(
                f"{path}: {count:,} of {value.numel():,} values of its tensor {name} are not finite, because the "
                f"training diverged or the file is damaged: {remedy}"
            )
    return state, about


def settled_path(path: str | Path) -> Path:
    """Where lies what was chosen of a weights file after its training: its test-time views, its calibration."""
    return Path(path).with_suffix(".settled.json")


def store_settled(path: str | Path, settled: dict) -> None:
    """Write what was chosen of a weights file, in plain values, beside it; the weights stay as they are.

    It names the contents of the weights file: other weights under the same name have nothing settled.
    """
    known = json.loads(json.dumps({"weights": file_digest(path), **settled}, default=plain))
    there = settled_path(path)
    if not there.is_file() or known != read_json(there, "delete it"):
        write_json(there, known)


def read_settled(path: str | Path) -> dict[str, Any]:
    """What store_settled wrote beside a weights file; {} where there is nothing, or something of other weights, which
    is printed.

    Raises DamagedFile for anything else.
    """
    there = settled_path(path)
    if not there.is_file():
        return {}
    settled = read_json(there, "delete it and run the training's stage again, which finds the weights finished")
    if settled.pop("weights", None) == file_digest(path):
        return settled
    _say_once(
        f"{path} has changed since its views and calibration were settled, it runs without those of {there.name}: "
        "take both files of one training, or run its stage again"
    )
    return {}


@functools.cache
def _say_once(sentence):
    """Weights are asked for what is settled many times in a run."""
    print(sentence)


def check_network(
    path: str | Path, build: Callable[[], torch.nn.Module], state: Mapping[str, torch.Tensor], remedy: str
) -> None:
    """Raise DamagedFile unless the network that `build` returns has the tensors of `state`, by name, shape and kind of
    number (floating, whole, ...; not its precision), and they are not all zeros.

    It is built without memory, so that what a file states takes none before it is known to be true.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class RealSteps(TorchFunctionMode):
        """timm reads the values of a linspace, which a tensor without memory does not have."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if function is torch.linspace:
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

    with torch.device("meta"), RealSteps():
        network = build().state_dict()
    wanted = {name: tuple(value.shape) for name, value in network.items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise DamagedFile(
                f"{path}: the network that it states has the tensor {name} with the shape {wanted.get(name)}, the file "
                f"has {given.get(name)}: {remedy}"
            )
    for name, value in network.items():
        if _kind_of_number(value.dtype) != _kind_of_number(state[name].dtype):
            raise DamagedFile(
                f"{path}: its tensor {name} is of {state[name].dtype}, the network that it states has {value.dtype} "
                f"there: {remedy}"
            )
    floating = [value for value in state.values() if value.is_floating_point()]
    if floating and not any(value.any() for value in floating):
        raise DamagedFile(f"{path}: all values of its network are 0, as no training leaves them: {remedy}")


def _kind_of_number(dtype):
    """What loading into a network may not change; a shorter float is how detectors are kept."""
    import torch

    kinds = {"floating": dtype.is_floating_point, "complex": dtype.is_complex, "bool": dtype is torch.bool}
    return next((kind for kind, is_so in kinds.items() if is_so), "whole")


class Stated:
    """What a file states, to be checked: each method returns the value or raises DamagedFile, which names both.

    path: of the file; about: dict from its metadata; remedy: ends the message. A key that is absent counts as None,
    which is allowed where `optional` is given.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any], remedy: str) -> None:
        self.path, self.about, self.remedy = path, about, remedy

    def refuse(self, name: str, wanted: str, value: Any = None) -> NoReturn:
        value = repr(self.about.get(name) if value is None else value)
        value = value if len(value) < 80 else value[:77] + "..."
        raise DamagedFile(f"{self.path} states {name} {value}, it must be {wanted}: {self.remedy}")

    def keys(self, known: Iterable[str]) -> None:
        """Only these keys."""
        for name in self.about:
            if name not in known:
                self.refuse(name, f"one of {', '.join(known)} (there is no such key)", name)

    def choice(self, name: str, options: Iterable, optional: bool = False) -> Any:
        value = self.about.get(name)
        if not (optional and value is None) and not any(type(value) is type(o) and value == o for o in options):
            self.refuse(name, f"one of {', '.join(map(str, options))}")
        return value

    def number(self, name: str, low: float, high: float, whole: bool = False, optional: bool = False) -> Any:
        value = self.about.get(name)
        if not (optional and value is None) and not _is_number(value, low, high, whole):
            self.refuse(name, f"a{' whole' * whole} number from {low} to {high}")
        return value

    def numbers(
        self, name: str, shape: Sequence[int], low: float, high: float, whole: bool = False, optional: bool = False
    ) -> Any:
        """Lists within lists of this shape, of numbers from low to high."""
        value = self.about.get(name)

        def fits(part, shape):
            if not shape:
                return _is_number(part, low, high, whole)
            return isinstance(part, list) and len(part) == shape[0] and all(fits(item, shape[1:]) for item in part)

        if not (optional and value is None) and not fits(value, tuple(shape)):
            sides = " x ".join(map(str, shape))
            self.refuse(name, f"{sides}{' whole' * whole} numbers from {low} to {high}")
        return value

    @overload
    def part(self, name: str) -> Stated: ...

    @overload
    def part(self, name: str, optional: bool) -> Stated | None: ...

    def part(self, name: str, optional: bool = False) -> Stated | None:
        """A dict within, as Stated; of None where it may be absent."""
        value = self.about.get(name)
        if optional and value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "a JSON object")
        return Stated(self.path, value, self.remedy)

    def parts(self, name: str, most: int, optional: bool = False) -> list[Stated]:
        """A list of at most so many dicts, as a list of Stated."""
        value = self.about.get(name)
        if optional and value is None:
            return []
        if not isinstance(value, list) or len(value) > most or not all(isinstance(item, dict) for item in value):
            self.refuse(name, f"a list of at most {most} JSON objects")
        return [Stated(self.path, item, self.remedy) for item in value]


def _is_number(value: Any, low: float, high: float, whole: bool) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
