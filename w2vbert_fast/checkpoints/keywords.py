"""Keyword arguments of transformers that have no parameter here: which are taken, and which not.

Code that was written for transformers passes its `from_pretrained` and `save_pretrained` arguments
that choose how weights travel, not what a model computes. These tables name them all. A keyword
whose value would change an answer, or that asks for what is not done here, is refused with the
reason; the others have no effect. What stands in no table belongs to the caller's configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any], str | None]
"""From a keyword's value to the reason why it is refused, None where it is taken."""


def _any(value: object) -> None:
    return None


def _unset(reason: str) -> Rule:
    """Nothing but None, False and empty values."""
    return lambda value: reason if value else None


_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def _attention(value: object) -> str | None:
    """All names of attention implementations: every one computes what is computed here."""
    names = value.values() if isinstance(value, Mapping) else [value]
    for name in names:
        known = name is None or (
            isinstance(name, str) and name.removeprefix("paged|") in _ATTENTION
        )
        # "organisation/name" is a kernel on the hub.
        if not known and not (isinstance(name, str) and ("/" in name or name.startswith("flash"))):
            return f"it must be one of {', '.join(_ATTENTION)}; all give the same answer here"
    return None


_ONE_DEVICE = (
    "a model is loaded whole, onto one device (device= or device_map=); shard it afterwards, with "
    "FSDP or Accelerate"
)
_CONVERT = "weights are read from safetensors and PyTorch files; convert them first"
_KERNELS = "use_fast_kernels=True switches the kernels of this package on"

READING: dict[str, Rule] = {
    "_commit_hash": _any,
    "_from_auto": _any,
    "_from_pipeline": _any,
    "code_revision": _any,
    "etag_timeout": _any,
    "mirror": _any,
    "proxies": _any,  # huggingface_hub reads HTTPS_PROXY
    "resume_download": _any,
    "trust_remote_code": _any,  # no code of a checkpoint is ever run
    "user_agent": _any,
}
"""Everything that is loaded from a folder or the hub."""

LOADING: dict[str, Rule] = READING | {
    "_fast_init": _any,
    "adapter_kwargs": _unset(
        "load the model, then its adapter with peft.PeftModel.from_pretrained"
    ),
    "adapter_name": _any,
    "allow_all_kernels": _any,
    "attn_implementation": _attention,
    "device_mesh": _unset(_ONE_DEVICE),
    "disable_mmap": _any,
    "distributed_config": _unset(_ONE_DEVICE),
    "experts_implementation": _any,
    "from_flax": _unset(_CONVERT),
    "from_tf": _unset(_CONVERT),
    "fusion_config": _unset(_KERNELS),
    "generation_config": _any,
    "gguf_file": _unset(_CONVERT),
    "kernel_config": _unset(_KERNELS),
    "key_mapping": _unset("rename the tensors and save them first"),
    "load_in_4bit": _unset('dtype="int8" quantises the encoder'),
    "load_in_8bit": _unset('dtype="int8" quantises the encoder'),
    "low_cpu_mem_usage": _any,  # memory stays near the size of the weights, always
    "max_memory": _any,
    "offload_buffers": _any,
    "offload_folder": _any,
    "offload_state_dict": _any,
    "quantization_config": _unset('dtype="int8" quantises the encoder'),
    "state_dict": _unset("load the model, then call its load_state_dict"),
    "torchscript": _unset("return_dict=False gives tuples; `w2vbert-fast export` writes programs"),
    "tp_plan": _unset(_ONE_DEVICE),
    "tp_size": _unset(_ONE_DEVICE),
    "tqdm_class": _any,
    "use_flash_attention_2": _any,
    "use_kernels": _unset(_KERNELS),
    "weights_only": _any,  # pickles are never run
}
"""Models."""

TOKENIZERS: dict[str, Rule] = {
    "tokenizer_type": _any,  # there is one
    "use_fast": _any,  # and no other implementation of it
}
"""Tokenizers, and what loads one."""

SAVING: dict[str, Rule] = {
    "distributed_checkpoint": _unset("gather the shards and pass them as state_dict="),
    "safe_serialization": _any,  # weights are written as safetensors, whatever it is
    "save_function": _any,  # the same holds for how
    "save_original_format": _any,
    "save_peft_format": _any,
    "variant": _unset("weights of a variant are read, not written"),
}
"""Models that are saved."""


def take(keywords: Mapping[str, Any], table: Mapping[str, Rule]) -> dict[str, Any]:
    """The keywords that a table does not list.

    Raises:
        ValueError: a listed one has a value that is refused; the message says why.
    """
    for name in keywords.keys() & table.keys():
        reason = table[name](keywords[name])
        if reason is not None:
            raise ValueError(f"{name} is {keywords[name]!r}; {reason}")
    return {name: value for name, value in keywords.items() if name not in table}
