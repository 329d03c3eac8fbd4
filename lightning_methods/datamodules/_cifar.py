"""Reading CIFAR-100's own files, which are Python pickles, without letting them run code."""

import pickle
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

NUM_CLASSES = 100
_HOW_TO_GET = (
    "Expected layout: <root>/cifar-100-python/{train,test,meta}, the unpacked cifar-100-python.tar.gz of "
    "https://www.cs.toronto.edu/~kriz/cifar.html"
)


def read_split(root: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images and fine labels of one of CIFAR-100's two files.

    Args:
        root: Folder that holds `cifar-100-python`.
        name: "train" or "test".

    Returns:
        Images (N, 3, 32, 32), uint8, and labels (N,), int64 in 0 … 99, in the order of the file.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: The file is damaged, asks to run code, or holds something else than CIFAR-100.
    """
    path, content = _read_pickle(root, name, required=("data", "fine_labels"))
    data, labels = _as_array(content["data"]), _as_array(content["fine_labels"])
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise ValueError(f"{path}: data must be uint8 of shape (N, 3072), found {data.dtype} {data.shape}")
    if labels.shape != data.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: fine_labels must be {len(data)} integers, one per image, found {labels.dtype} {labels.shape}"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= NUM_CLASSES))
    if wrong.size:
        raise ValueError(
            f"{path}: {wrong.size} of {len(labels)} fine_labels are outside 0 … {NUM_CLASSES - 1}; "
            f"first: fine_labels[{wrong[0]}] = {labels[wrong[0]]}"
        )
    return torch.tensor(data).view(-1, 3, 32, 32), torch.tensor(labels.astype(np.int64))


def read_class_names(root: Path) -> list[str]:
    """Names of the 100 fine classes, in label order, from the file `meta`.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: The file is damaged, asks to run code, or does not name 100 classes.
    """
    path, content = _read_pickle(root, "meta", required=("fine_label_names",))
    names = [_text(name) for name in content["fine_label_names"]]
    if len(names) != NUM_CLASSES:
        raise ValueError(f"{path}: fine_label_names must be {NUM_CLASSES} names, found {len(names)}")
    return names


def _read_pickle(root: Path, name: str, required: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    path = root / "cifar-100-python" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {_HOW_TO_GET}")
    try:
        with path.open("rb") as file:
            # The official files were written by Python 2, whose strings are bytes.
            content = _DataUnpickler(file, encoding="bytes").load()
    except Exception as error:  # damaged pickles raise almost anything
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}). {_HOW_TO_GET}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict, found {type(content).__name__}. {_HOW_TO_GET}")
    content = {_text(key): value for key, value in content.items()}
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; its keys: {sorted(content)}. {_HOW_TO_GET}")
    return path, content


def _as_array(value: Any) -> np.ndarray[Any, Any]:
    return value.value if isinstance(value, _Array) else np.asarray(value)


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _Dtype:
    """What a pickle says of an array's dtype."""

    code, order = "", "="

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = _text(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def numpy(self) -> np.dtype[Any]:
        dtype = np.dtype(self.code)
        if dtype.kind not in "iuf":
            raise pickle.UnpicklingError(f"dtype {self.code!r} is not one of numbers")
        ordered: np.dtype[Any] = dtype.newbyteorder(self.order)  # type: ignore[arg-type]
        return ordered


class _Array:
    """What a pickle says of an array; `value` is the array."""

    value: np.ndarray[Any, Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_major, raw = state
        self.value = np.frombuffer(raw, dtype.numpy()).reshape(shape, order="F" if column_major else "C")


def _empty_array(*_: object) -> _Array:
    return _Array()


def _array_from_buffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> _Array:
    array = _Array()
    array.value = np.frombuffer(raw, dtype.numpy()).reshape(shape, order=order)
    return array


def _number(dtype: _Dtype, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype.numpy())[0]


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not one that pickled bytes use")
    return text.encode("latin1")


class _DataUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and arrays of numbers, and refuses to look up anything else.

    Nothing of numpy is handed to the file either: `numpy.ndarray` itself lays an array of Python objects over
    any bytes that it is given, and the file would choose them.
    """

    _stand_ins: ClassVar[dict[str, Any]] = {
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
        "numpy.core.multiarray._reconstruct": _empty_array,
        "numpy.core.multiarray.scalar": _number,
        "numpy.core.numeric._frombuffer": _array_from_buffer,
        "_codecs.encode": _encode_latin1,  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module}.{name}"
        try:
            return self._stand_ins[asked.replace("numpy._core.", "numpy.core.")]  # renamed in numpy 2
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {asked}, which data never needs") from None
