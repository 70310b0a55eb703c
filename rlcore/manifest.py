"""What a checkpoint says that it holds, and whether it does.

A manifest is a JSON object: a header, each leaf's shape, dtype and checksum, and a checksum of its own. This
module reads and writes no file.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlcore.errors import InputError
from rlcore.tree import named_leaves

FORMAT = 1

_NAMES_SHOWN = 4
_NATIVE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64} | {
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}
_CARRIER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_numpy(name: str, leaf: Tensor) -> np.ndarray:
    """The leaf's bits on the host; types that numpy lacks (bfloat16) travel as integers of the same width.

    Raises:
      TypeError: if the leaf is not a tensor.
    """
    if not isinstance(leaf, Tensor):
        raise TypeError(f"a state's leaves must be tensors, but {name} is a {type(leaf).__name__}")
    leaf = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return (leaf if leaf.dtype in _NATIVE else leaf.view(_CARRIER[leaf.element_size()])).numpy()


def from_numpy(name: str, array: Any, stored: Mapping[str, Any], target: Tensor) -> Tensor:
    """The tensor that `to_numpy` was given, on `target`'s device.

    Raises:
      ValueError: if the bits are not those that `stored` describes.
    """
    if not target.numel():
        return torch.empty_like(target)
    array = np.array(array, order="C")
    if list(array.shape) != stored["shape"] or _checksum(array) != stored["crc32"]:
        raise ValueError(f"the bits of {name} are not those that were written")
    tensor = torch.from_numpy(array)
    return (tensor if tensor.dtype == target.dtype else tensor.view(target.dtype)).to(target.device)


def describe(header: Mapping[str, Any], tree: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The manifest of `tree`, whose leaves are `arrays` on the host."""
    leaves = {
        name: {
            "shape": list(leaf.shape),
            "dtype": _dtype_name(leaf),
            "crc32": _checksum(arrays[name]),
        }
        for name, leaf in named_leaves(tree)
    }
    content = {"format": FORMAT, **header, "leaves": leaves}
    return {**content, "crc32": _text_checksum(content)}


def checked(manifest: Any) -> dict[str, Any]:
    """The manifest, if it is one and unaltered.

    Raises:
      ValueError: if it is not.
    """
    if not isinstance(manifest, dict) or "crc32" not in manifest:
        raise ValueError("its manifest is not one of rlcore's")
    content = {name: value for name, value in manifest.items() if name != "crc32"}
    if _text_checksum(content) != manifest["crc32"]:
        raise ValueError("its manifest was altered")
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']}, this rlcore reads {FORMAT}")
    return content


def check_fit(where: Path, stored: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """Compare the stored leaves with those of the tree to restore into.

    Raises:
      InputError: at the first name, shape or dtype that differs.
    """
    for names, what in (
        ([n for n in wanted if n not in stored], "lacks what is needed here"),
        ([n for n in stored if n not in wanted], "has what is unknown here"),
    ):
        if names:
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            raise InputError(f"{where} does not fit: it {what}: {', '.join(names[:_NAMES_SHOWN])}{more}")
    for name, leaf in wanted.items():
        for kind, here in (("shape", list(leaf.shape)), ("dtype", _dtype_name(leaf))):
            if (there := stored[name][kind]) != here:
                raise InputError(f"{where} does not fit: {name} is {there} in the checkpoint but {here} here")


def _dtype_name(leaf: Tensor) -> str:
    return str(leaf.dtype).removeprefix("torch.")


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data) if array.size else 0


def _text_checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
