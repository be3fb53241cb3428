"""Two places where transformers goes by class, not by what an object can do.

Its pipelines turn every dictionary that is no `ModelOutput` into a plain one, which has no
attributes; and its `Trainer` writes the weights of a model that is no `PreTrainedModel` without a
`config.json`, so that nothing can load them. Both are met here, in a process where transformers is
loaded, and nothing happens in one where it is not.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor


def join_transformers(output_class: type) -> None:
    """Make up for both differences, once, when transformers is there. Costs two look-ups.

    Models call it whenever they are moved to a device, as a `Trainer` does first, and when they
    have answered, so that it does not matter which library is imported first.

    Args:
        output_class: the base of all outputs, which becomes a subclass of transformers' own. The
            methods of both mean the same, and those of `output_class` come first.
    """
    theirs = getattr(sys.modules.get("transformers.utils.generic"), "ModelOutput", None)
    if theirs is not None and not issubclass(output_class, theirs):
        output_class.__bases__ = (theirs,)
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is not None and not getattr(trainer._save, "writes_config_of_w2vbert", False):
        trainer._save = _with_config(trainer._save)


def _with_config(save: Callable[..., None]) -> Callable[..., None]:
    """`Trainer._save`, which beside the weights of a model of this package writes `config.json`."""

    @functools.wraps(save)
    def save_with_config(
        trainer: Any,
        output_dir: str | os.PathLike[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        save(trainer, output_dir, state_dict)
        model = trainer.accelerator.unwrap_model(trainer.model)
        # Of the class: PEFT's models hand on the attributes of what they wrap.
        if hasattr(type(model), "config_to_save") and trainer.args.should_save:
            model.config_to_save().save_pretrained(output_dir or trainer.args.output_dir)

    save_with_config.writes_config_of_w2vbert = True  # type: ignore[attr-defined]
    return save_with_config
