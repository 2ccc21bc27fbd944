"""YAML read with the line of every value, so that a message can name the place of a mistake."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from db.errors import GridError


@dataclass(frozen=True, slots=True)
class Located:
    """A YAML value and where it stands."""

    value: Any
    """A scalar, a list of Located, or a dict from str to Located."""
    line: int
    """Line of the value in the file, from 1."""
    source: str
    """Name of the file."""

    def error(self, text: str) -> GridError:
        """Make an error that begins with file and line."""
        return GridError(f"{self.source}:{self.line}: {text}")

    def mapping(self, what: str) -> dict[str, "Located"]:
        """Return the keys and values, or refuse anything that is no mapping."""
        if not isinstance(self.value, dict):
            raise self.error(f"{what} must be a mapping 'name: value', got {self.describe()}")
        return self.value

    def items(self, what: str) -> list["Located"]:
        """Return the elements, or refuse anything that is no list."""
        if not isinstance(self.value, list):
            raise self.error(f"{what} must be a list, got {self.describe()}")
        return self.value

    def scalar(self, what: str) -> Any:
        """Return the plain value, or refuse a list or mapping."""
        if isinstance(self.value, list | dict):
            raise self.error(f"{what} must be a single value, got {self.describe()}")
        return self.value

    def describe(self) -> str:
        """Short text of what stands here."""
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, list):
            return "a list"
        return "nothing" if self.value is None else repr(self.value)


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 that also reads `1e-3` as a number, as people and YAML 1.2 do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_located(path: Path) -> Located:
    """Read a YAML file.

    Raises
    ------
    GridError
        The file cannot be read, is not YAML, or a mapping has the same key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GridError(f"{path}: there is no such grid file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GridError(f"{path}: cannot be read: {error}") from None
    return parse_located(text, str(path))


def parse_located(text: str, source: str) -> Located:
    """Read YAML from a string; `source` is the file name in messages."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise GridError(f"{source}:1: the file is empty; it needs at least 'dataset: NAME'")
        return _locate(loader, node, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise GridError(f"{source}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise GridError(f"{source}: not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _locate(loader: _Loader, node: yaml.Node, source: str, depth: int = 0) -> Located:
    line = node.start_mark.line + 1
    if depth > 8:
        raise GridError(f"{source}:{line}: nested more than 8 levels deep")
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Located] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise GridError(f"{source}:{key_node.start_mark.line + 1}: a key must be text")
            if key in found:
                raise GridError(
                    f"{source}:{key_node.start_mark.line + 1}: key {key!r} stands twice "
                    f"(first on line {found[key].line})"
                )
            value = _locate(loader, value_node, source, depth + 1)
            found[key] = Located(value.value, key_node.start_mark.line + 1, source)
        return Located(found, line, source)
    if isinstance(node, yaml.SequenceNode):
        return Located([_locate(loader, n, source, depth + 1) for n in node.value], line, source)
    return Located(loader.construct_object(node), line, source)
