"""The first thing a notebook calls: working folder, packages, parameters, inputs.

May use: mounts, parameters, pasted, engine.
"""

import os
from pathlib import Path
from typing import Any

from .mounts import find_inputs, install_missing
from .parameters import notebook_parameters
from .pasted import pasted_paths


def start_notebook(history: list[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """Prepare a running notebook: its working folder, missing packages, checked parameters, inputs where they lie.

    Where the kernel was started in notebooks/, as JupyterLab does, it moves to the repository, from which paths in
    parameters count; elsewhere (papermill, Kaggle) the working folder stays.

    Parameters
    ----------
    history : IPython's `In`, in which the parameters cell and papermill's injected one are found.
    namespace : the notebook's `globals()`; paths that were pasted lose what is around them (see pasted_path), those of
        Kaggle's inputs become the ones at which they are mounted.

    Returns
    -------
    dict name -> value of the parameters in force, pasted paths tidied (see find_inputs for what the namespace gets).

    Raises
    ------
    ValueError, TypeError for a parameter that does not exist or is invalid, ModuleNotFoundError for a package
    that is neither installed nor attached.
    """
    root = Path(__file__).resolve().parents[2]
    if Path.cwd() == root / "notebooks":
        os.chdir(root)
    install_missing()
    if os.environ.get("LUMBAR_ENGINE"):  # a wrong one would cost every study its levels, one by one
        from ..engine import check_engine

        check_engine()
    parameters = notebook_parameters(history, namespace)
    paths = pasted_paths(parameters)
    parameters |= paths
    namespace.update(paths)
    namespace.update(find_inputs(parameters))
    return parameters
