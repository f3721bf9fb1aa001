"""One model served on many vLLM instances as if they were one; see ARCHITECTURE.md."""

from importlib import metadata

try:
    __version__ = metadata.version("llumnix")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0+checkout"
