"""Hugging Face datasets."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zsq.architectures import error_summary
from zsq.errors import UsageError, import_extra
from zsq.pictures import Source, picture_reader
from zsq.teacher import ModelSpec

_IMAGE_COLUMNS = ("image", "img", "picture", "pixels")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "digit")


def open_hugging_face(text: str, spec: ModelSpec, labelled: bool) -> Source:
    name, _, split = text.partition("@")
    datasets = import_extra("datasets", "hf")
    splits = [str(found) for found in _from_hub(datasets.get_dataset_split_names, name)]
    split = split or next((s for s in ("test", "validation") if s in splits), "")
    if split not in splits:
        came = f"no split {split!r}" if split else "neither a split 'test' nor 'validation'"
        example = f"hf:{name}@{splits[0]}" if splits else f"hf:{name}@SPLIT"
        raise UsageError(
            f"The Hugging Face dataset {name} has {came}. It has {', '.join(splits) or 'none'}; name one, "
            f"for example {example}."
        )
    rows = _from_hub(datasets.load_dataset, name, split=split)
    features = dict(rows.features)
    images = _column(features, "Image", _IMAGE_COLUMNS, name)
    labels, class_names = None, ()
    try:
        column = _column(features, "ClassLabel", _LABEL_COLUMNS, name)
        labels = _label_tensor(list(rows[column]), column, name)
        class_names = tuple(getattr(features[column], "names", None) or ())
    except UsageError:
        if labelled:
            raise
    return Source(
        name=f"The Hugging Face dataset {name}@{split}",
        count=len(rows),
        # One thread: the library does not promise that rows can be read from several.
        read=picture_reader(
            lambda index: _picture_of(rows[index][images]),
            lambda index: f"in row {index} of {name}@{split}",
            spec,
            threads=1,
        ),
        labels=labels,
        class_names=class_names,
    )


def _from_hub(call: Callable[..., Any], name: str, **options: str) -> Any:
    try:
        return call(name, **options)
    except Exception as error:  # of many packages: network, permissions, file formats, the library's own
        raise UsageError(
            f"The Hugging Face dataset {name} could not be loaded ({error_summary(error)}). Check the name "
            "and the network, or give a path."
        ) from error


def _column(features: dict[str, Any], kind: str, usual: tuple[str, ...], dataset: str) -> str:
    """The column of type `kind`; among several, or if there is none, the first of the `usual` names."""
    typed = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(typed) == 1:
        return typed[0]
    if found := [column for column in usual if column in (typed or features)]:
        return found[0]
    what = f"more than one column of type {kind}" if typed else f"no column of type {kind}"
    raise UsageError(
        f"The Hugging Face dataset {dataset} has {what} and none called {', '.join(usual)}; its columns are "
        f"{', '.join(features)}. Expected a set for image classification."
    )


def _label_tensor(values: list[Any], column: str, dataset: str) -> Tensor:
    wrong = [value for value in values if not isinstance(value, int) or isinstance(value, bool)]
    if wrong:
        raise UsageError(
            f"The column {column} of the Hugging Face dataset {dataset} holds {wrong[0]!r}. Expected the "
            "number of a class in every row."
        )
    return torch.tensor(values, dtype=torch.int64)


def _picture_of(value: Any) -> Any:
    """A cell of an image column: a picture, or a dictionary with the bytes or the path of its file."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, Image.Image | bytes | str):
        raise UsageError(
            f"A cell of the image column holds a {type(value).__name__}. Expected a picture or "
            "the content of its file."
        )
    return value
