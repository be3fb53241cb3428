"""Models as files of other runtimes: ONNX, AOTInductor packages and `torch.export` programs."""

from w2vbert_fast.export.formats import FORMATS, Exported, ExportError, export, run_exported
from w2vbert_fast.export.graph import ExportGraph

__all__ = ["FORMATS", "ExportError", "ExportGraph", "Exported", "export", "run_exported"]
