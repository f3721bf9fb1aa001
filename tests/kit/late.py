"""A module that takes long to import, as vLLM does, and whose process takes long to end."""

import atexit
import os
import time
from pathlib import Path

if "LATE_SIGN" in os.environ:
    Path(os.environ["LATE_SIGN"]).touch()
time.sleep(float(os.environ["LATE_SECONDS"]))
atexit.register(time.sleep, 60)
