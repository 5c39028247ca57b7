"""Files that are whole or not there: written beside their place, synced and renamed."""

import os
import tempfile
from pathlib import Path


class OutputError(ValueError):
    """The output folder can't be used: not writable, not a folder, disk full."""


def check_writable(output: Path) -> None:
    """Make the output folder and try to write in it, before any work is done.

    Raises:
        OutputError: it can't be made or written.
    """
    probe = output / ".writable"
    write_atomically(probe, "")
    probe.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader or a crash sees the old content or the new, never a part.

    Raises:
        OutputError: the folder can't be made or written, or the disk is full; the old content is then untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise _output_error(path, error) from error


def sync(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_error(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {path}: {error.strerror or error}. "
        "Free some space, or name a folder you can write with --output."
    )
