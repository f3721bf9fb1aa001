"""What the fork server imports before all else, to end with its node while it imports the rest.

And to have its logs in lines, which vLLM's import builds on.
"""

import os

from llumnix import log_lines
from llumnix.engine.vllm.processes.parent_death import PARENT, end_with_parent

if PARENT in os.environ:  # else this is imported by something else
    end_with_parent(int(os.environ.pop(PARENT)))
    log_lines.install()
