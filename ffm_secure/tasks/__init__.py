"""What is learned: data, head, per-sample loss and metric of each kind of task."""

from __future__ import annotations


from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone
from ffm_secure.registry import TASKS
from ffm_secure.tasks.base import Evaluation, Task, TaskData
from ffm_secure.tasks.encoded import Encoded, EncodedImages, EncodedText
from ffm_secure.tasks.image import ImageClassification
from ffm_secure.tasks.text import CausalLM, MaskedLM, TextClassification


def build_task(
    kind: str, *, backbone: Backbone, dataset: object, max_length: int = 64, fixed_length: bool = False
) -> Task:
    """Build a task for a backbone and a data set:
    anything with text_columns, label_column and image_column.
    """
    if kind not in TASKS:
        raise ModelError(f"task.kind = {kind!r}: must be one of {', '.join(TASKS)}")
    data = TaskData(
        text_columns=tuple(getattr(dataset, "text_columns", ()) or ()),
        label_column=getattr(dataset, "label_column", None),
        label_names=tuple(getattr(dataset, "label_names", ()) or ()),
        image_column=getattr(dataset, "image_column", None),
        answered=tuple(getattr(dataset, "answered", ()) or ()),
        is_chat=bool(getattr(dataset, "is_chat", False)),
        answers_only=bool(getattr(dataset, "answers_only", True)),
    )
    task: type[Task] = TASKS.load(kind)
    return task(backbone, data, max_length=max_length, fixed_length=fixed_length)


__all__ = [
    "TASKS",
    "CausalLM",
    "Encoded",
    "EncodedImages",
    "EncodedText",
    "Evaluation",
    "ImageClassification",
    "MaskedLM",
    "Task",
    "TaskData",
    "TextClassification",
    "build_task",
]
