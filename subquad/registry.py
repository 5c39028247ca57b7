"""The registry: from a name to the config class that stands for a mechanism.

It is filled by import: each file under `mechanisms/` and `feedforward/` registers its config class, and a user's own
class joins in the same way. It holds no knowledge of what a config class is beyond its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic, TypeVar, overload

from subquad.config import nearest

ConfigClass = TypeVar("ConfigClass", bound=type)


class Registry(Generic[ConfigClass]):
    """Names and classes of one slot of a layer."""

    def __init__(self, slot: str) -> None:
        self.slot = slot
        self._classes: dict[str, ConfigClass] = {}

    def add(self, name: str, config_class: ConfigClass) -> None:
        """Enter a class.

        Raises:
            ValueError: the name is no snake_case identifier, or stands for another class already.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"a {self.slot}'s name must be snake_case letters, digits and underscores, got {name!r}")
        present = self._classes.get(name)
        if present is not None and (present.__module__, present.__qualname__) != (
            config_class.__module__,
            config_class.__qualname__,
        ):
            raise ValueError(
                f"the name {name!r} is taken by {present.__module__}.{present.__qualname__}; choose another"
            )
        self._classes[name] = config_class

    def lookup(self, name: str) -> ConfigClass:
        """The class of a name.

        Raises:
            ValueError: unknown name; the message proposes the nearest one.
        """
        if name not in self._classes:
            raise ValueError(f"unknown {self.slot} {name!r}; {nearest(name, self._classes)}")
        return self._classes[name]

    def remove(self, name: str) -> None:
        """Take a class out again; for tests that register their own.

        Raises:
            ValueError: unknown name.
        """
        self.lookup(name)
        del self._classes[name]

    def items(self) -> list[tuple[str, ConfigClass]]:
        """All names and classes, in alphabetical order of the names."""
        return sorted(self._classes.items())


MIXERS: Registry[type] = Registry("token mixer")
FEEDFORWARDS: Registry[type] = Registry("channel mixer")


def default_name(config_class: type) -> str:
    """`LocalConfig` -> `local`, `MyOwnConfig` -> `my_own`."""
    stem = config_class.__name__.removesuffix("Config") or config_class.__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()


@overload
def register(name: str) -> Callable[[ConfigClass], ConfigClass]: ...
@overload
def register(name: ConfigClass) -> ConfigClass: ...
def register(name: str | type) -> object:
    """Class decorator: enter a config class under a name.

    `@register("my_mixer")` names it; plain `@register` takes the class's name in snake_case without `Config`. From
    then on the mechanism is in `list_mixers`, the command line, the contract tests, comparisons and the report.

    Raises:
        ValueError: the name is taken or no identifier, or the class is no `MixerConfig` or `FeedforwardConfig`.
    """
    if isinstance(name, str):
        return lambda config_class: _enter(name, config_class)
    return _enter(default_name(name), name)


def _enter(name: str, config_class: ConfigClass) -> ConfigClass:
    registry = getattr(config_class, "registry", None)
    if not isinstance(registry, Registry):
        raise ValueError(f"{config_class!r} can't be registered: derive it from MixerConfig or FeedforwardConfig")
    registry.add(name, config_class)
    config_class.name = name  # pyright: ignore[reportAttributeAccessIssue] - a ClassVar of both config bases
    return config_class
