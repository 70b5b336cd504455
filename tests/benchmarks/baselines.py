"""What the two solutions do otherwise than the kit: A's point clouds, B's scheme of detectors, and networks with one
mean over a volume.

Detectors and networks are the kit's own classes with another part, so that both train by the kit's trainers. The kit
refuses their weights: load them here.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lumbar.data.resample import crop_center, study_box
from lumbar.grade.classifier import USUAL_LEVEL_CENTERS, OrdinalClassifier, load_classifier
from lumbar.grade.detector import dense_scores, rebuild_detector
from lumbar.grade.detector_data import SeverityImages
from lumbar.grade.ordinal import CumulativeHeads, cumulative_log_probabilities
from lumbar.grade.trainer import Recipe
from lumbar.names import CONDITIONS, DESCRIPTIONS, DETECTORS, LEVELS, SEVERITIES
from lumbar.weights import read_weights

BOX_PX = 20.0  # side of B's boxes on images of BOX_IMGSZ px
BOX_IMGSZ = 384
# ultralytics' usual flip, which B left on. It is wrong there: the picture changes sides, the class names do not, so
# that half of all axial examples teach the other side. Kept, because this is what is compared.
ORIGINAL_SETTINGS = {"fliplr": 0.5}


# ---- Solution A's point clouds ----


def smeared_cloud(study, step_mm=1.0):
    """Every voxel of a study as coloured points of an open3d.geometry.PointCloud in LPS millimetres.

    A voxel becomes ceil(slice thickness / step_mm) points, spread over the slice thickness along the slice normal. The
    colour's red, green and blue are T1, axial T2 and T2/STIR, clipped to [0, 1]. Some 50 million points for a study.
    """
    import open3d as o3d

    smears = [max(1, math.ceil(volume.thickness_mm / step_mm)) for volume in study.volumes]
    count = sum(volume.array.size * smear for volume, smear in zip(study.volumes, smears, strict=True))
    cloud = o3d.geometry.PointCloud()
    points = np.empty((count, 3))
    at = 0
    for volume, smear in zip(study.volumes, smears, strict=True):
        normal = np.cross(volume.affine[:3, 2], volume.affine[:3, 1])
        normal *= volume.thickness_mm / np.linalg.norm(normal)
        centers = volume.voxel_to_lps(np.stack(np.indices(volume.array.shape), -1)).reshape(-1, 3)
        for share in (np.arange(smear) + 0.5) / smear - 0.5:
            np.add(centers, normal * share, out=points[at : at + len(centers)])
            at += len(centers)
    cloud.points = o3d.utility.Vector3dVector(points)
    del points
    colours = np.zeros((count, 3))
    at = 0
    for volume, smear in zip(study.volumes, smears, strict=True):
        own = colours[at : at + volume.array.size * smear, DESCRIPTIONS.index(volume.description)]
        own[:] = np.tile(np.clip(volume.array.ravel(), 0, 1), smear)
        at += len(own)
    cloud.colors = o3d.utility.Vector3dVector(colours)
    return cloud


def voxelise_point_cloud(study, box, crop, pooling="max", voxel_mm=1.0, cloud=None):
    """The same crop the point-cloud way: what crop_level and crop_study are compared with, and why they are not this.

    Points (smeared_cloud) inside the oriented box fall into voxels of voxel_mm, each of which keeps their brightest
    (pooling "max") or mean ("average") colour; the grid is then resized to the crop's shape. Voxels that no point falls
    into are holes; the mean mixes black from the other series' points into each channel.
    box: LevelBox, None for the whole study; crop: Crop; cloud: smeared_cloud(study), if it is at hand.
    Returns (crop (3, d, h, w) float16, occupied (3, d, h, w) bool: brighter than 0 in the nearest voxel). Needs Open3D
    (ImportError).
    """
    import open3d as o3d

    mode = getattr(o3d.geometry.VoxelGrid.VoxelPoolingMode, {"max": "MAX", "average": "AVG"}[pooling])
    center, axes = study_box(study) if box is None else (crop_center(box, crop), np.asarray(box.axes))
    cloud = smeared_cloud(study, voxel_mm) if cloud is None else cloud
    foot_mm, back_mm, left_mm = crop.extent_mm
    extent_mm = np.array([foot_mm, left_mm, back_mm])  # along the box's axes
    part = cloud.crop(o3d.geometry.OrientedBoundingBox(center, axes.T, extent_mm))
    # Into the crop's axes: head to foot, front to back, right to left, from the box's corner.
    size = np.asarray(crop.extent_mm)
    to_crop = np.eye(4)
    to_crop[:3, :3] = np.stack([-axes[0], axes[2], axes[1]])
    to_crop[:3, 3] = size / 2 - to_crop[:3, :3] @ center
    part.transform(to_crop)
    cells = np.maximum(1, np.ceil(size / voxel_mm - 1e-6)).astype(int)
    dense = np.zeros((3, *cells), np.float32)
    if len(part.points):
        grid = o3d.geometry.VoxelGrid.create_from_point_cloud_within_bounds(part, voxel_mm, np.zeros(3), size, mode)
        voxels = grid.get_voxels()
        index = np.array([voxel.grid_index for voxel in voxels])
        colour = np.array([voxel.color for voxel in voxels])
        inside = (index < cells).all(1)  # a point on the far face
        dense[(slice(None), *index[inside].T)] = colour[inside].T
    dense = torch.from_numpy(dense)[None]
    colours = F.interpolate(dense, crop.shape, mode="trilinear", align_corners=False)[0]
    occupied = F.interpolate((dense > 0).float(), crop.shape, mode="nearest-exact")[0]
    return colours.half().numpy(), (occupied > 0).numpy()


# ---- Solution B's detectors ----


def letterbox_slice(volume, index, imgsz):
    """A whole slice as stored, in 8 bits, its longer side imgsz px, padded with ultralytics' grey to a square.

    volume: Volume in the normalised scale. Returns (image (imgsz, imgsz) uint8, to_slice (3, 3)), see slice_patch.
    """
    height, width = volume.array.shape[1:]
    new = [max(1, round(side * imgsz / max(height, width))) for side in (height, width)]
    slice_ = torch.from_numpy(np.asarray(volume.array[index], dtype=np.float32))[None, None]
    slice_ = F.interpolate(slice_, size=new, mode="bilinear", align_corners=False, antialias=True)[0, 0].numpy()
    image = np.full((imgsz, imgsz), 114, np.uint8)
    top, left = (imgsz - new[0]) // 2, (imgsz - new[1]) // 2
    image[top : top + new[0], left : left + new[1]] = (np.clip(slice_, 0, 1) * 255 + 0.5).astype(np.uint8)
    scale_x, scale_y = width / new[1], height / new[0]
    to_slice = [[scale_x, 0, (0.5 - left) * scale_x - 0.5], [0, scale_y, (0.5 - top) * scale_y - 0.5], [0, 0, 1]]
    return image, np.array(to_slice)


def original_names(condition):
    """The original scheme's classes of a detector: a name for each condition, level and severity, in this order."""
    return [
        f"{CONDITIONS[c]}_{level}_{grade}" for c in DETECTORS[condition][1] for level in LEVELS for grade in SEVERITIES
    ]


class WholeSlices(SeverityImages):
    """B's images: the labelled slices alone, whole, imgsz px square; a class for each condition, level and severity."""

    scheme = "original"

    def __init__(self, condition, imgsz=BOX_IMGSZ):
        self.condition = condition
        self.shape_px, self.mm_per_px = (imgsz, imgsz), None
        self.box_px = BOX_PX * imgsz / BOX_IMGSZ
        self.about = {"names": original_names(condition), "box_px": self.box_px}

    def of_study(self, study, here):
        first = DETECTORS[self.condition][1][0]
        for (v, k), rows in here.groupby(["volume", "slice"]):
            image, to_slice = letterbox_slice(study.volumes[v], k, self.shape_px[0])
            xy = (np.linalg.inv(to_slice) @ np.c_[rows[["x_px", "y_px"]], np.ones(len(rows))].T).T[:, :2]
            cell = (rows["condition"].to_numpy() - first) * len(LEVELS) + rows["level"].to_numpy()
            yield study.volumes[v], k, image, cell * len(SEVERITIES) + rows["grade"].to_numpy(), xy


def load_original(path, device="cpu"):
    """A detector that train_yolo trained on WholeSlices: YoloDetector. The file is taken to be one of ours."""
    return rebuild_detector(path, *read_weights(path, "metadata", "train it again"), device)


def original_study(detector, study, batch=16):
    """(conditions, 5 levels, 3) probabilities: each class' best confidence over all anchors and slices, normalised over
    the severities; 1/3 where nothing is said. No geometry, no calibration."""
    description, conditions = DETECTORS[detector.condition]
    own = [volume for volume in study.volumes if volume.description == description]
    imgsz = detector.about["imgsz"]
    images = [letterbox_slice(volume, k, imgsz)[0] for volume in own for k in range(len(volume.array))]
    images = np.stack(images) if images else np.zeros((0, imgsz, imgsz), np.uint8)
    best = dense_scores(detector, images, batch)[0].max(axis=(0, 1), initial=0)
    return original_probabilities(best.reshape(len(conditions), len(LEVELS), len(SEVERITIES)))


def original_probabilities(scores):
    """Best confidences (..., 3) of the original scheme, normalised over the severities; 1/3 where nothing is said."""
    scores = np.nan_to_num(np.asarray(scores, dtype=np.float64))
    total = scores.sum(axis=-1, keepdims=True)
    return np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / len(SEVERITIES))


# ---- Networks with one mean over the volume ----


class GlobalClassifier(OrdinalClassifier):
    """One mean over the whole volume: for scope `level` 5 heads whose cut points all levels share, for scope `study` 25
    outputs of the one vector, each with its own cut points."""

    layout = "global"

    def __init__(self, scope, backbone, img_size, prior, dropout=0.2, level_centers=USUAL_LEVEL_CENTERS, *others):
        super().__init__(scope, backbone, img_size, prior, dropout, level_centers, *others)
        if scope == "study":
            del self.attention
        outputs = len(CONDITIONS) * (len(LEVELS) if scope == "study" else 1)
        self.score = nn.Linear(self.backbone.num_features, outputs)
        nn.init.normal_(self.score.weight, std=0.03)
        nn.init.zeros_(self.score.bias)
        self.heads = CumulativeHeads(np.mean(prior, 1) if scope == "level" else prior)

    def forward(self, x, level=None):
        features = self._features(x)
        with torch.autocast(x.device.type, enabled=False):
            score = self.score(self.dropout(features.float().mean((2, 3, 4))))
            cutpoints = self.heads.cutpoints
            if self.scope == "study":
                score = score.view(len(x), *cutpoints.shape[:2])
            elif level.ndim == 2:
                score = score[:, None].expand(-1, level.shape[1], -1)
            return cumulative_log_probabilities(score, cutpoints)


class GlobalRecipe(Recipe):
    """The trainer's recipe for it."""

    network = GlobalClassifier


def load_global(path, device="cpu"):
    """(GlobalClassifier in evaluation mode, about): what train_classifier wrote of one."""
    return load_classifier(path, device, GlobalClassifier)
