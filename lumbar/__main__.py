"""`python -m lumbar FOLDER`: levels of any folder of lumbar MRI, and with weights its probabilities.

The same steps as notebooks/predict.ipynb.

May use: look, serve, engine, storage.
"""

import argparse
import io
import sys
from pathlib import Path

from .engine import check_engine
from .look.folder_pages import write_pages
from .look.slices import level_name
from .serve.folder import find_studies, lay_out, series_table
from .serve.predict_folder import folder_log, grade_folder, locate_folder, members_of, placement_of, read_problems
from .storage import write_csv


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 with a sentence on stderr for input that cannot serve."""
    parser = argparse.ArgumentParser(prog="python -m lumbar", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder or zip of DICOM files, of one study or many, in any order")
    parser.add_argument("--out", default="runs/predict", help="folder for the results (default: %(default)s)")
    parser.add_argument("--weights", nargs="+", default=[], help="folders of finished runs: grade the levels as well")
    parser.add_argument("--prior-only", action="store_true", help="accept predictions that rest on no image at all")
    parser.add_argument("--workers", type=int, default=2, help="threads (default: %(default)s)")
    given = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    out = Path(given.out)
    try:
        check_engine()
        members = members_of(given.weights)
        studies = find_studies(given.folder, out, given.workers)
        lay_out(studies, out)
        print(series_table(studies).to_string(index=False, max_colwidth=60))
        levels, _ = locate_folder(out, placement_of(members), given.workers)
        log = grade_folder(out, members, given.weights, given.prior_only, given.workers) if members else None
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log = folder_log(studies, levels, read_problems(out), log)
    write_csv(out / "inference_log.csv", log)
    for row in levels.itertuples():
        doubt = f", or {level_name(row.second)} ({row.second_share:.0%})" if row.second_share else ""
        place = f"{row.x_mm:.0f} {row.y_mm:.0f} {row.z_mm:.0f}"
        print(f"study {row.study_id} {level_name(row.level)}: centre at {place} mm (LPS){doubt}")
    for row in log[log["problems"] != ""].itertuples():
        print(f"study {row.study_id}: {row.problems}")
    print(f"pages: {write_pages(out, log)[0]}")
    print(
        f"To pass on: the pages, slicer/ and the tables but studies.csv. The rest of {out} holds the patient's images."
    )
    if members:
        print("Research software, not a medical device: weights trained on phantoms say nothing about patients.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
