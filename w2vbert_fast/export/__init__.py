"""Models as files of other runtimes: ONNX, AOTInductor packages and `torch.export` programs."""

from .formats import FORMATS, Exported, ExportError, export, run_exported
from .graph import ExportGraph

__all__ = ["FORMATS", "ExportError", "ExportGraph", "Exported", "export", "run_exported"]
