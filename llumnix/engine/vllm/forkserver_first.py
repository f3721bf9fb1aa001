"""What the fork server imports before all else, to end with its node while it imports the rest."""

import os

from llumnix.engine.vllm.parent_death import PARENT, end_with_parent

if PARENT in os.environ:  # else this is imported by something else
    end_with_parent(int(os.environ.pop(PARENT)))
