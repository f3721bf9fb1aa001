"""A module that takes long to import, as vLLM does, and whose process takes long to end."""

import atexit
import os
import tempfile
import time
from pathlib import Path

Path(tempfile.gettempdir(), "importing").touch()
time.sleep(float(os.environ["LATE_SECONDS"]))
atexit.register(time.sleep, 60)
