"""YAML as recipes need it: `2e-5` is a number, and a key that stands twice is an error."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from hfpos.scheme import PatchError


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, in which `2e-5` is text and the last of two equal keys wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the parent's; two equal keys are an error."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_yaml(source: str | Path, is_text: bool = False) -> Any:
    """Read a file, or text.

    Raises:
        PatchError: no such file, or no YAML in it. For text, `yaml.YAMLError`.

    >>> load_yaml("2e-5", is_text=True), load_yaml("{a: [1, x]}", is_text=True)
    (2e-05, {'a': [1, 'x']})
    """
    if is_text:
        return yaml.load(str(source), Loader=_Loader)  # noqa: S506 (a subclass of the safe one)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(f"cannot read {source} ({error}); expected a recipe in YAML") from error
    try:
        return load_yaml(text, is_text=True)
    except yaml.YAMLError as error:
        raise PatchError(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def dump_yaml(values: Any) -> str:
    """Write plain values, keys in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
