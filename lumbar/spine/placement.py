"""How levels are placed: what finds the bodies, and where they lie where nothing is seen.

In lumbar/spine a detector finds vertebrae and a prior says where levels lie; in lumbar/grade a detector finds disease
and a prior says how frequent the severities are.

May use: spinenet, official, vertebra, data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..data.volume import Volume
from .official import official_detector
from .spinenet import SpineNet, detect_vertebrae
from .vertebra import Vertebra

Detector = str | Callable[[Volume], list[Vertebra]]  # "own", "official", or a function

_LOCATING_VERSION = 8  # to be raised when the same network gives other levels: results kept by older code do not count


@dataclass(frozen=True)
class Placement:
    """How levels are placed, made once from the weights.

    Parameters
    ----------
    prior : dict
        From fit_level_prior: the layout by which bodies are named, and missing ones placed.
    layout : dict
        As prior, for where nothing is seen: how these patients lie (locate_with_own_layout), else the prior again.
    detector : callable
        From a sagittal Volume to its Vertebrae, which may have names already.
    name : str
        Of the detector.
    network : SpineNet, optional
        What the detector runs; part of what the answers depend on.
    """

    prior: dict[str, Any]
    layout: dict[str, Any]
    detector: Callable[[Volume], list[Vertebra]]
    name: str
    network: SpineNet | None = None

    @classmethod
    def of(
        cls,
        model: SpineNet | Placement | None,
        detector: Detector = "own",
        prior: dict[str, Any] | None = None,
        layout: dict[str, Any] | None = None,
    ) -> Placement:
        """The placement that weights carry; what is given replaces its part.

        Parameters
        ----------
        model : SpineNet, Placement or None
            None sees nothing, unless a detector is given. A Placement is returned as it is.
        detector : str or callable
            `own` (the model), `official` (the research-only package, see official.py, loaded here), or a function from
            a Volume to Vertebrae.
        prior, layout : dict, optional
            Default: those of the weights.

        Raises
        ------
        ValueError
            An unknown detector, or neither a prior nor weights that carry one.
        ImportError
            `official` without the package.
        """
        if isinstance(model, Placement):
            return model
        about = model.about if model is not None else {}
        prior = prior if prior is not None else about.get("prior")
        if prior is None:
            raise ValueError("levels cannot be placed without a prior: give fit_level_prior's, or 02's weights")
        detect, name = _detector(detector, model)
        return cls(prior, layout or about.get("layout") or prior, detect, name, model)

    def blind(self) -> Placement:
        """The same where nothing is seen in the images."""
        return replace(self, detector=lambda volume: [], name="none")

    def key(self) -> str:
        """What a study's levels depend on besides its images, as a hash: weights, prior, detector."""
        digest = hashlib.sha256(json.dumps([_LOCATING_VERSION, self.prior, self.name]).encode())
        if isinstance(self.network, nn.Module):
            for name, value in self.network.state_dict().items():
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _detector(detector: Detector, model: SpineNet | None) -> tuple[Callable[[Volume], list[Vertebra]], str]:
    """(what finds the bodies of a volume, its name). A function's name is its repr."""
    if callable(detector):
        return detector, repr(detector)
    if detector == "own":
        return (lambda volume: detect_vertebrae(model, volume) if model is not None else []), detector
    if detector == "official":
        return official_detector(
            str(next(model.parameters()).device) if isinstance(model, nn.Module) else "cpu"
        ), detector
    raise ValueError(f'detector is {detector!r}: "own", "official", or a function that takes a Volume')
