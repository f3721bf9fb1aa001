"""The file of priority classes: what it says, and the one sentence when it cannot be."""

from math import inf
from pathlib import Path

import pytest

from llumnix.config import ConfigError
from llumnix.node.options import read_classes
from llumnix.policy.priority_classes import NO_CLASSES, PriorityClass

DEPLOY = Path(__file__).parents[3] / "deploy"


def test_the_example() -> None:
    classes = read_classes(str(DEPLOY / "classes.yaml")).by_priority
    assert dict(classes) == {
        -1: PriorityClass("high", -1, target_tokens=1600, ttft=0.5, tpot=0.05),
        0: PriorityClass("normal", 0, ttft=5, tpot=0.2),
        10: PriorityClass("batch", 10, ttft=inf, tpot=inf),
    }


def test_no_file_is_no_classes() -> None:
    assert read_classes("") is NO_CLASSES


BAD = {
    "classes: [high": "is no YAML: ",
    "classes: \x00": "is no YAML: ",
    "": "must be a mapping with the one key 'classes'",
    "- high": "must be a mapping with the one key 'classes'",
    "classes: {a: {priority: 1}}\ncolour: red": "must be a mapping with the one key 'classes'",
    "classes: {}": "'classes' must be a mapping of names to classes",
    "classes: [high]": "'classes' must be a mapping of names to classes",
    "classes: {'7': {priority: 1}}": "'7' is no name of a class",
    "classes: {7: {priority: 1}}": "7 is no name of a class",
    "classes: {a: 1}": "class a must be a mapping, such as {priority: 0}",
    "classes: {a: }": "class a must be a mapping",
    "classes: {a: {}}": "class a has no priority",
    "classes: {a: {priority: 1, colour: red}}": "class a has no colour; there are priority, ",
    "classes: {a: {priority: 1, 5: 5}}": "class a has no 5",
    "classes: {a: {priority: high}}": "priority of class a must be a whole number, not 'high'",
    "classes: {a: {priority: true}}": "priority of class a must be a whole number, not True",
    "classes: {a: {priority: 0.5}}": "priority of class a must be a whole number, not 0.5",
    "classes: {a: {priority: 99999999999999999999}}": "priority of class a has more than 64 bits",
    "classes: {a: {priority: 1, headroom_tokens: -1}}": "headroom_tokens of class a must not be",
    "classes: {a: {priority: 1, target_tokens: 1.5}}": "target_tokens of class a must be a whole",
    "classes: {a: {priority: 1, ttft: -0.5}}": "ttft of class a must not be negative, but is -0.5",
    "classes: {a: {priority: 1, tpot: .nan}}": "tpot of class a must be a number, not nan",
    "classes: {a: {priority: 1, tpot: soon}}": "tpot of class a must be a number, not 'soon'",
    "classes: {a: {priority: 1, headroom_tokens: 1, target_tokens: 1}}": "both a headroom and a",
    "classes: {a: {priority: 1}, b: {priority: 1}}": "classes a and b have the same priority, 1",
}


@pytest.mark.parametrize(("text", "part"), BAD.items(), ids=range(len(BAD)))
def test_a_file_that_cannot_work(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_classes(str(file))
    sentence = str(refused.value)
    assert sentence.startswith(f"--priority-classes: {file}") and part in sentence
    assert "\n" not in sentence


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"classes\.yaml can't be read: No such file"):
        read_classes(str(tmp_path / "classes.yaml"))
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        read_classes(str(tmp_path))
