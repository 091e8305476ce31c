"""Pages in a headless browser, where one is installed."""

import shutil
import subprocess

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser is installed (Debian: apt-get install chromium)"
)


def browse(address, folder, *, width=1400, dark=False, dump=False):
    """Load a page headless, without network: its DOM or a picture, and what the console said.

    What 127.0.0.1 serves is reached.
    """
    arguments = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1200"),
        *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=5000"),
        *("--enable-logging=stderr", "--v=0"),
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]
    end = "--dump-dom" if dump else f"--screenshot={folder / 'shot.png'}"
    done = subprocess.run(
        [CHROMIUM, *arguments, end, address], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console
