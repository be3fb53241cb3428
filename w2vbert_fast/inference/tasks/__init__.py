"""What is wanted of recordings, a class a task: their text, hidden states, or classes."""

from w2vbert_fast.inference.tasks.align import Align
from w2vbert_fast.inference.tasks.base import Task
from w2vbert_fast.inference.tasks.classify import Classify
from w2vbert_fast.inference.tasks.embed import Embed
from w2vbert_fast.inference.tasks.transcribe import Transcribe

TASKS: dict[str, type[Task]] = {task.name: task for task in (Transcribe, Align, Embed, Classify)}
"""The tasks by name."""

__all__ = ["TASKS", "Align", "Classify", "Embed", "Task", "Transcribe"]
