"""The tasks by name. A new task is its own file and one line here."""

from types import MappingProxyType

from subquad.config import nearest
from subquad.tasks.base import Task
from subquad.tasks.copy import CopyTask
from subquad.tasks.duplicate import DuplicateTask
from subquad.tasks.image_lm import ImageLmTask
from subquad.tasks.listops import ListopsTask
from subquad.tasks.mqar import MqarTask
from subquad.tasks.reverse import ReverseTask
from subquad.tasks.text import TextTask
from subquad.tasks.text_lm import TextLmTask
from subquad.tasks.text_mlm import TextMlmTask

_CLASSES = (ListopsTask, ImageLmTask, CopyTask, ReverseTask, DuplicateTask, MqarTask, TextTask, TextLmTask, TextMlmTask)
_TASKS = MappingProxyType({task.name: task for task in _CLASSES})


def list_tasks() -> list[str]:
    """Names of all tasks, sorted."""
    return sorted(_TASKS)


def load_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        ValueError: if there is none; names the nearest and lists them all.
    """
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}; {nearest(name, _TASKS)}")
    return _TASKS[name]()
