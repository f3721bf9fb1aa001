"""The operator's own tool and reasoning parsers."""

from pathlib import Path

import pytest

from llumnix.config import from_arguments
from llumnix.engine.vllm.arguments import check, make_parser
from tests.kit import aloud


def test_a_parser_of_the_operators_is_known_by_its_name() -> None:
    options = ["--reasoning-parser", "aloud", "--reasoning-parser-plugin", aloud.__file__]
    parser = make_parser("node")
    arguments = parser.parse_args(options)
    assert check(parser, arguments) == from_arguments(arguments)


@pytest.mark.parametrize("kind", ["tool-call", "reasoning"])
def test_a_parser_that_there_is_not(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "own.py"
    empty.touch()
    plugin = "tool-parser" if kind == "tool-call" else "reasoning-parser"
    options = [f"--{kind}-parser", "nobody", f"--{plugin}-plugin", str(empty)]
    parser = make_parser("node")
    with pytest.raises(SystemExit):
        check(parser, parser.parse_args(options))
    assert f"--{kind}-parser: there is no parser nobody" in capsys.readouterr().err
