"""The version, from the installed package."""

from importlib import metadata

try:
    VERSION = metadata.version("llumnix")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "0.0.0+checkout"
