"""`BatchFeature`, what the feature extractor, the tokenizer and the processor return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def tensor_type(return_tensors: object) -> str | None:
    """Normalises a `return_tensors` argument to "pt", "np" or None.

    Raises:
        ValueError: It is none of these.
    """
    for kind in ("pt", "np"):
        if isinstance(return_tensors, str) and return_tensors == kind:
            return kind
    if return_tensors is None:
        return None
    raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")


class BatchFeature(dict[str, Any]):
    """A dictionary whose entries are also attributes, e.g. `batch.input_features`.

    Args:
        data: The entries: tensors, arrays or lists by name.
        tensor_type: "pt" or "np" to convert the entries at once, as `convert_to_tensors` does.

    Raises:
        ValueError: An entry cannot be converted.
    """

    def __init__(
        self, data: Mapping[str, Any] | None = None, tensor_type: str | None = None
    ) -> None:
        super().__init__(data or {})
        self.convert_to_tensors(tensor_type)

    @property
    def data(self) -> BatchFeature:
        """This object, the dictionary of its entries. Another one can be put in its place."""
        return self

    @data.setter
    def data(self, value: Mapping[str, Any]) -> None:
        entries = dict(value)
        self.clear()
        self.update(entries)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"{type(self).__name__} has no entry {name!r}; it has {sorted(self)}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            object.__setattr__(self, name, value)
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f"{type(self).__name__} has no entry {name!r}")
        del self[name]

    def copy(self) -> BatchFeature:
        """A shallow copy."""
        return BatchFeature(self)

    def convert_to_tensors(self, tensor_type: str | None = None) -> BatchFeature:
        """Converts lists and arrays to tensors, in place.

        Args:
            tensor_type: "pt" for torch tensors, "np" for NumPy arrays, None to leave all as it is.

        Returns:
            This object. Entries without numbers (strings, dictionaries, None) stay as they are. A
            ragged entry becomes a NumPy array of objects, an array for each row.

        Raises:
            ValueError: An entry is ragged, so that no torch tensor holds it.
        """
        kind = _tensor_type(tensor_type)
        if kind is not None:
            converted = {key: _convert(key, value, kind) for key, value in self.items()}
            self.update(converted)
        return self

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Moves tensors to a device or casts them, in place, as `torch.Tensor.to` does.

        Args:
            *args: A device, a dtype, or both. A dtype applies to floating point tensors only, so
                that masks and labels stay integers.
            **kwargs: `device`, `dtype`, `non_blocking`, `copy`.

        Returns:
            This object.

        Raises:
            TypeError: An argument is neither a device nor a dtype.
        """
        device = kwargs.pop("device", None)
        dtype = kwargs.pop("dtype", None)
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, str | torch.device | int) and not isinstance(argument, bool):
                device = argument
            else:
                raise TypeError(f"to() takes a device and a dtype, got {argument!r}")

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                cast = dtype if value.is_floating_point() else None
                return value.to(device=device, dtype=cast, **kwargs)
            if isinstance(value, list):
                return [move(item) for item in value]
            if isinstance(value, tuple):
                return tuple(move(item) for item in value)
            return value

        self.update({key: move(value) for key, value in self.items()})
        return self


_tensor_type = tensor_type


def _convert(key: str, value: Any, kind: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value if kind == "pt" else value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return value if kind == "np" else torch.from_numpy(value)
    if not isinstance(value, list | tuple | int | float) or _first_leaf_is_not_a_number(value):
        return value
    try:
        if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
            stacked = torch.stack(list(value))
            return stacked if kind == "pt" else stacked.detach().cpu().numpy()
        if kind == "np" and isinstance(value, list | tuple) and _is_ragged(value):
            return ragged_array(value)
        array = np.asarray(value)
        if array.dtype == object:
            raise ValueError("it holds things of several kinds")
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{key} cannot become one tensor: {error}. Pass padding=True so that all rows are of "
            "equal length, or return_tensors=None to get lists"
        ) from error
    return array if kind == "np" else torch.from_numpy(array)


def ragged_array(rows: Sequence[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """Rows of different lengths as a NumPy array of objects, ``[batch]``, an array for each."""
    array = np.empty(len(rows), dtype=object)
    for index, row in enumerate(rows):
        array[index] = (
            row.detach().cpu().numpy() if isinstance(row, torch.Tensor) else np.array(row)
        )
    return array


def _is_ragged(rows: Sequence[Any]) -> bool:
    """Whether rows have different lengths."""
    if not all(isinstance(row, list | tuple | np.ndarray | torch.Tensor) for row in rows):
        return False
    return len({len(row) for row in rows}) > 1


def _first_leaf_is_not_a_number(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return not isinstance(
        value, list | tuple | bool | int | float | np.ndarray | np.generic | torch.Tensor
    )
