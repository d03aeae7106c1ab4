"""docs/troubleshooting.md quotes what the code says, and leaves out no class and no warning."""

import ast
import re
from pathlib import Path

import pytest

from grass_fx import errors

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("grass_fx/**/*.py"), *ROOT.glob("passes/*.py")])
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
WARNING = "GrassWarning"
CLASSES = [name for name, value in vars(errors).items() if isinstance(value, type)]
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
QUOTED = re.findall(r"^(Grass\w+|\w+Error): (.*)$", PAGE, re.M)


def pattern(message: ast.expr) -> str:
    """A regular expression for the text of a message; what is filled in matches anything."""
    if isinstance(message, ast.Constant):
        return re.escape(str(message.value))
    if isinstance(message, ast.JoinedStr):
        return "".join(pattern(part) for part in message.values)
    return "(?s:.*?)"


def said() -> list[tuple[str, str, str]]:
    """(class, pattern, place) of every message in the source."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            if name == "warn" and path.name != "errors.py":
                name = "GrassWarning"
            if name in CLASSES:
                found.append((name, pattern(node.args[0]), f"{path.name}:{node.lineno}"))
    return found


SAID = said()


def test_the_source_has_messages_of_every_class():
    assert {name for name, _, _ in SAID} == {*CLASSES} - {"GrassError"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_a_section_that_quotes_it(name):
    quotes = re.findall(rf"^{name}: ", SECTIONS[name], re.M)
    assert quotes or name == "GrassError"  # which is never raised itself


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda quoted: quoted[1][:40])
def test_every_quoted_message_is_one_of_the_code(quoted):
    name, message = quoted
    fixed = [each for cls, each, _ in SAID if cls == name and re.search(r"\w{3}", each)]
    assert any(re.fullmatch(each, message) for each in fixed), message


def test_every_warning_is_quoted():
    warnings = [(each, place) for name, each, place in SAID if name == "GrassWarning"]
    messages = [message for name, message in QUOTED if name == "GrassWarning"]
    missing = [
        place for each, place in warnings if not any(re.fullmatch(each, m) for m in messages)
    ]
    assert warnings and not missing  # put these into docs/troubleshooting.md, with a remedy
