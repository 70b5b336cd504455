"""A headless Chromium for these tests; without one, or without playwright, they are skipped and say why.

What they need and the kit does not: `pip install playwright jupyterlab axe-playwright-python` and Debian's `chromium`
(or Chrome). playwright drives that browser; it downloads none of its own. axe-playwright-python brings axe-core.
"""

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def chromium():
    """The browser, started once."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root, as whom tests run in containers.
        arguments = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=[*arguments, "--disable-dev-shm-usage"])
        yield browser
        browser.close()
