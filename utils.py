"""The lumbar kit: one front for all shared code, in the order in which data flows.

 1. lumbar/names.py        conditions, levels, severities, the columns of tables, progress bars
                           (storage.py: files that are written whole or not at all, and what a damaged one is;
                           weights.py: what a weights file may state; limits.py: CPU time of a study;
                           in_flight.py: what a process was at when it died)
 2. lumbar/stages.py       one folder and one manifest a stage; running notebooks
                           (parameters.py: a notebook's parameters, checked before anything runs)
 3. lumbar/tables.py       train.csv and friends, row by row
                           (files.py: labels and submissions as arrays, competition_score, folds)
 4. lumbar/dicom.py        DICOM files -> slices -> volumes
                           (volume.py: Volume(array, affine to LPS mm), Study; preprocess.py: every study of a split)
 5. lumbar/geometry.py     level boxes, crops, whole-study grids, the point cloud
 6. lumbar/spinenet.py     vertebral bodies by vector-field regression: network, training, detection
 7. lumbar/levels.py       detections named in one chain; a box per level; how good they are
 8. lumbar/randomise.py    training images for SpineNet: painted anatomies, random contrasts, artefacts
 9. lumbar/finetune.py     SpineNet trained further on the competition's own label points
10. lumbar/official.py     vertebrae from SpineNet's official package, for those who may use it
11. lumbar/views.py        test-time views, and which of them pay
12. lumbar/yolo.py         detectors: data sets, training, dense class scores, side and level by geometry
                           (yolo_trainer.py: the part of it that ultralytics' own processes import)
13. lumbar/distributed.py  training in several processes or on several GPUs
14. lumbar/classifiers.py  timm_3d backbones, cumulative logits, crops and their views, training
15. lumbar/ensemble.py     weights, calibration, the stacker, what each gains
16. lumbar/inference.py    a study in, 25 rows out, whatever is broken
17. lumbar/looking.py      plots, tables, the report as a page
18. lumbar/viewer.py       a study to look at: viewer for notebooks, page that opens offline
19. lumbar/kaggle.py       where inputs are mounted, staging and pushing kernels and data sets

Everything public is reached as `utils.name`. Heavy libraries (ultralytics, open3d, timm_3d, pydicom) are imported
where they are used.

Frames: patient coordinates are DICOM LPS in millimetres (x to the patient's left, y to the back, z to the head);
names end in _lps or _mm. Arrays have the axes (slice, row, column); pixel coordinates in tables are x = column and
y = row of a pixel's centre, names end in _px. Crops have the axes (channel, head to foot, front to back, right to
left). Probabilities have the axes (study, condition, level, severity).
"""

# ruff: noqa: F403
from lumbar.agreement import *
from lumbar.classifiers import *
from lumbar.dicom import *
from lumbar.distributed import *
from lumbar.ensemble import *
from lumbar.files import *
from lumbar.finetune import *
from lumbar.geometry import *
from lumbar.greys import *
from lumbar.in_flight import *
from lumbar.inference import *
from lumbar.kaggle import *
from lumbar.levels import *
from lumbar.limits import *
from lumbar.looking import *
from lumbar.names import *
from lumbar.official import *
from lumbar.parameters import *
from lumbar.pixels import *
from lumbar.preprocess import *
from lumbar.randomise import *
from lumbar.spinenet import *
from lumbar.stacks import *
from lumbar.stages import *
from lumbar.storage import *
from lumbar.tables import *
from lumbar.viewer import *
from lumbar.views import *
from lumbar.volume import *
from lumbar.yolo import *
