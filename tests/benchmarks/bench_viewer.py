"""How long the viewer takes to redraw, and to make a study's page: in a headless Chromium, on a study of real size.

    python tests/benchmarks/bench_viewer.py --json viewer.json

A phantom study as bench_geometry.py writes it (two sagittal series of 20 slices, 384 x 384; 40 axial slices,
320 x 320), with boxes, vertebrae, label points and predictions. A redraw is timed in the browser from the event to the
end of the frame in which the picture has changed; the table has the median and the slowest of all events of a kind. A
script, which pytest does not collect; needs playwright and Chromium (see tests/browser/conftest.py).
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent), str(ROOT / "tests")]

import bench_geometry  # noqa: E402
import numpy as np  # noqa: E402
from small_study import make_probabilities  # noqa: E402

import utils  # noqa: E402

# Each event is sent from a quiet state; a picture is on its way to the screen when the second frame after it begins.
TIMED = """async ([kind, count]) => {
  const frame = () => new Promise(requestAnimationFrame), times = [];
  const root = document.querySelector('.lumbar-viewer'), slider = root.querySelector('figure input[type=range]');
  const svg = root.querySelector('figure svg'), area = svg.getBoundingClientRect();
  const space = root.querySelector('.space canvas');
  const send = (type, share, on = svg) => on.dispatchEvent(new PointerEvent(type, { pointerId: 1, bubbles: true,
    clientX: area.left + area.width*share, clientY: area.top + area.height*share }));
  svg.setPointerCapture = space.setPointerCapture = () => {};
  const cells = [...root.querySelectorAll('td[data-cell]')];
  const events = {
    slider: n => { slider.value = n % 20; slider.dispatchEvent(new Event('input')); },
    wheel: n => svg.dispatchEvent(new WheelEvent('wheel', { deltaY: n % 20 < 10 ? 120 : -120, cancelable: true })),
    click: n => { send('pointerdown', .3 + .4*(n % 10)/10); send('pointerup', .5); },
    window: n => { const w = root.querySelector('input[data-grey=width]'); w.value = .4 + (n % 10)/10;
      w.dispatchEvent(new Event('input')); },
    cell: n => cells[(7*n) % cells.length].click(),
    turn: n => { send('pointerdown', .5, space); send('pointermove', .52 + .02*(n % 5), space);
      send('pointerup', .5, space); },
  };
  for (let n = 0; n < count; n++) {
    await frame(); await frame();
    const drawn = root.dataset.drawn, start = performance.now();
    events[kind](n);
    while (root.dataset.drawn === drawn) await frame();
    await frame();
    times.push(performance.now() - start);
  }
  return times;
}"""


def make_page(folder):
    """Write the study's page; returns (path, seconds to make it)."""
    own = Path(folder) / "1"
    bench_geometry.write_study(own, 3)
    study, boxes = bench_geometry.load(own)
    probabilities, truth = make_probabilities()
    started = time.perf_counter()
    page = utils.study_html(study, boxes, None, probabilities, truth, page=True)
    seconds = time.perf_counter() - started
    return utils.write_text(Path(folder) / "study.html", page), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="events of each kind")
    parser.add_argument("--json", help="write the figures here, too")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path, seconds = make_page(folder)
        size = path.stat().st_size
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1500})
        started = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelector('.lumbar-viewer[data-drawn]')")
        opened = time.perf_counter() - started
        page.wait_for_timeout(2000)
        rows = {kind: page.evaluate(TIMED, [kind, options.count]) for kind in ("slider", "wheel", "click", "window")}
        rows |= {kind: page.evaluate(TIMED, [kind, options.count]) for kind in ("cell", "turn")}
        page.locator("input[data-show=cloud]").click()
        rows["turn with points"] = page.evaluate(TIMED, ["turn", options.count])
        browser.close()
    print(f"page: {size / 1e6:.1f} MB, made in {seconds:.2f} s, opened in {opened:.2f} s\n")
    print("| event | median ms | 95% | slowest |\n|---|---|---|---|")
    for kind, times in rows.items():
        print(f"| {kind} | {statistics.median(times):.0f} | {np.percentile(times, 95):.0f} | {max(times):.0f} |")
    if options.json:
        utils.write_json(options.json, {"bytes": size, "made_s": seconds, "opened_s": opened, "redraw_ms": rows})


if __name__ == "__main__":
    main()
