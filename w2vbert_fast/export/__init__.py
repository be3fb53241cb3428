"""Models as files of others: ONNX, AOTInductor packages, `torch.export`, the original's layout."""

from w2vbert_fast.export.formats import FORMATS, Exported, ExportError, export, run_exported
from w2vbert_fast.export.graph import ExportGraph

__all__ = ["FORMATS", "ExportError", "ExportGraph", "Exported", "export", "run_exported"]
