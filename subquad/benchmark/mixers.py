"""Mixers as a user names them on the command line.

    full    local:window=65    ./mine.py:MyConfig    ./mine.py:MyConfig:window=9

A name may be followed by options, each behind a colon. A path to a Python file and a class in it is a mechanism of the
user's own: the file is run, since the user named it, and the class joins the registry. Nothing else is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subquad.build import mixer_config
from subquad.config import COMMA, nearest, read_options
from subquad.interface import MixerConfig
from subquad.registry import MIXERS, default_name, register


@dataclass(frozen=True)
class NamedMixer:
    """A mixer as named, and what the name stands for.

    Attributes:
        text: as the user wrote it; naming it so again gives the same.
        config: the config.
    """

    text: str
    config: MixerConfig


def parse_mixers(text: str) -> list[NamedMixer]:
    """Mixers from a comma-separated list.

    Raises:
        ValueError: nothing or something twice in the list, an unknown name or option, a file or class that isn't there.
    """
    named = [parse_mixer(part.strip()) for part in COMMA.split(text) if part.strip()]
    if not named:
        raise ValueError(f"expected mixers separated by commas, such as full,local:window=65; got {text!r}")
    for index, mixer in enumerate(named):
        if any(mixer.config == earlier.config for earlier in named[:index]):
            raise ValueError(f"mixer {mixer.text!r} is named twice")
    return named


def parse_mixer(text: str) -> NamedMixer:
    """One mixer.

    Raises:
        ValueError: an unknown name or option, or a file or class that isn't there.
    """
    name, *rest = text.split(":")
    if re.search(r",\s*\w+=", text) or "=" in name:
        raise ValueError(f"{text!r}: each option stands behind a colon, as in reformer:chunk=16:rounds=2")
    if name.endswith(".py"):
        if not rest:
            raise ValueError(f"{text!r}: name the config class in the file, as {name}:MyConfig")
        name = load_user_mixer(Path(name), rest.pop(0))
    options = read_options(text, rest)
    try:
        config = mixer_config(name, **options)
        _ = config.traits
    except ValueError:
        raise
    except Exception as error:  # only a mechanism of the user's own raises anything else
        raise ValueError(f"{text}: the config can't be made: {type(error).__name__}: {error}") from error
    return NamedMixer(text, config)


def load_user_mixer(path: Path, class_name: str) -> str:
    """Run the user's file, enter its config class in the registry, and return the registered name.

    Raises:
        ValueError: no such file or class, an error in the file, or a class that is no `MixerConfig`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # files of equal name are different files
    module_name = f"subquad_user_{path.stem}_{digest}"
    if module_name not in sys.modules:
        _run_file(path, module_name)
    config_class = _config_class(path, vars(sys.modules[module_name]), class_name)
    registered = next((name for name, known in MIXERS.items() if known is config_class), None)
    if registered is None:
        register(config_class)
        registered = default_name(config_class)
    return registered


def _config_class(path: Path, names: dict[str, Any], class_name: str) -> type[MixerConfig]:
    candidates = {
        name: value for name, value in names.items() if isinstance(value, type) and issubclass(value, MixerConfig)
    }
    config_class = candidates.get(class_name)
    if config_class is None:
        own = [name for name, value in candidates.items() if value.__module__ == names["__name__"]]
        raise ValueError(
            f"{path}: no class {class_name!r} derived from subquad.MixerConfig; {nearest(class_name, own)}"
        )
    if inspect.isabstract(config_class):
        missing = ", ".join(sorted(config_class.__abstractmethods__))
        raise ValueError(f"{path}: {class_name} is incomplete: it needs {missing}")
    return config_class


def _run_file(path: Path, module_name: str) -> None:
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"{path}: running the file failed: {type(error).__name__}: {error}") from error
