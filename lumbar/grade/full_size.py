"""What 04_train_vit trains at full size, where its parameters are left empty.

May use: nothing of the kit.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FullSize:
    """A scope's own values of four parameters of 04_train_vit."""

    backbone: str  # of timm_3d, for slices of timm
    batch: int  # crops at once in each process, what 16 GB hold
    epochs: int
    backbone_rate: float  # of the backbone, as a share of the learning rate


FULL_SIZE = {
    "level": FullSize("coatnet_rmlp_3_rw", 3, 40, 1.0),
    "study": FullSize("maxvit_rmlp_tiny_rw", 1, 40, 1.0),
    "slices": FullSize("convnext_small", 1, 12, 0.3),
}
