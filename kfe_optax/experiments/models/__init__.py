"""The networks of the experiments: ordinary Flax models that know nothing of this library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
from ml_collections import ConfigDict

from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.models.dense import Autoencoder, Classifier, make_dense
from kfe_optax.experiments.models.linear import INITIALIZERS, LinearNetwork
from kfe_optax.experiments.models.recurrent import CELLS, Recurrent
from kfe_optax.experiments.models.resnet import ResNet, stages
from kfe_optax.experiments.models.transformer import CharacterTransformer, VisionTransformer
from kfe_optax.experiments.models.vgg import STACKS, VGG

__all__ = [
    "KINDS",
    "VGG",
    "Autoencoder",
    "CharacterTransformer",
    "Classifier",
    "LinearNetwork",
    "Recurrent",
    "ResNet",
    "VisionTransformer",
    "make_model",
]


class Kind(NamedTuple):
    """A kind of model: its class, whether it reads text, and what the data give it."""

    model: type[nn.Module]
    text: bool = False
    given: tuple[str, ...] = ("image_shape",)


# Their fields are those of config.model.
KINDS: Mapping[str, Kind] = {
    "autoencoder": Kind(Autoencoder),
    "classifier": Kind(Classifier),
    "vgg": Kind(VGG),
    "resnet": Kind(ResNet),
    "vision_transformer": Kind(VisionTransformer),
    "transformer": Kind(CharacterTransformer, text=True, given=("vocabulary", "length")),
    "recurrent": Kind(Recurrent, text=True, given=("vocabulary",)),
    "linear": Kind(LinearNetwork, given=("outputs",)),
}


def make_model(settings: ConfigDict, dataset: Dataset) -> nn.Module:
    """The model that ``config.model`` describes, checked against the data that it will see.

    Example::

        model = make_model(ConfigDict({"kind": "resnet", "depth": 20, "batch_norm": False}), dataset)

    Raises:
      ExperimentError: the settings name no model, or not one of these data.
    """
    if settings.kind not in KINDS:
        raise ExperimentError(f"config.model.kind is '{settings.kind}'; choose one of {', '.join(KINDS)}.")
    kind = KINDS[settings.kind]
    if kind.text != bool(dataset.vocabulary):
        reads, data = ("text", "images") if kind.text else ("images", "text")
        raise ExperimentError(
            f"config.model.kind '{settings.kind}' reads {reads}, and the data ({dataset.source}) are {data}; change one of "
            "config.model.kind, config.data.name and config.data_dir."
        )
    if kind.model in (Autoencoder, Classifier):
        return make_dense(settings, dataset.pixels)
    fields = {name: _plain(value) for name, value in settings.items() if name != "kind"}
    model_class: Any = kind.model  # a dataclass, as Flax makes of every module
    known = {field.name for field in dataclasses.fields(model_class)} - {"parent", "name", *kind.given}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ExperimentError(
            f"A model of kind '{settings.kind}' has no config.model.{unknown[0]}; its fields are {', '.join(sorted(known))}."
        )
    model = model_class(**fields, **{name: _from_data(name, dataset) for name in kind.given})
    mistake = _mistake(model)
    if mistake:
        raise ExperimentError(mistake)
    return model


def _from_data(name: str, dataset: Dataset) -> Any:
    """A field of a model that the data give."""
    if name == "vocabulary":
        return dataset.vocabulary
    if name == "length":
        return dataset.pixels
    if name == "outputs":
        if not dataset.outputs:
            raise ExperimentError(
                f"config.model.kind 'linear' predicts targets, and the data ({dataset.source}) have labels; set "
                "config.data.name to 'planted'."
            )
        return dataset.outputs
    shape = dataset.image_shape
    if len(shape) not in (2, 3):
        raise ExperimentError(
            f"The images of the data ({dataset.source}) are rows of {dataset.pixels} pixels without height and width; "
            "a convolution needs arrays of shape (count, height, width) or (count, height, width, channels)."
        )
    return (*shape, 1) if len(shape) == 2 else tuple(shape)


def _plain(value: Any) -> Any:
    """Lists as tuples, so that a model can be hashed."""
    return tuple(value) if isinstance(value, list) else value


def _mistake(model: Any) -> str | None:
    """What is wrong with values that a model would only stumble over."""
    if isinstance(model, VGG) and model.depth not in STACKS:
        return f"config.model.depth is {model.depth}; a VGG has depth 11 or 16."
    if isinstance(model, ResNet) and stages(model.depth) is None:
        return f"config.model.depth is {model.depth}; a residual network has 18, 34, or 6k + 2 (20, 32, 110)."
    if isinstance(model, LinearNetwork) and model.depth < 2:
        return f"config.model.depth is {model.depth}; a linear network has at least 2 layers."
    if isinstance(model, LinearNetwork) and model.initializer not in INITIALIZERS:
        return f"config.model.initializer is '{model.initializer}'; choose one of {', '.join(INITIALIZERS)}."
    if isinstance(model, Recurrent) and model.cell not in CELLS:
        return f"config.model.cell is '{model.cell}'; choose one of {', '.join(CELLS)}."
    if isinstance(model, CharacterTransformer | VisionTransformer) and model.width % model.heads:
        return (
            f"config.model.width is {model.width} and 'heads' is {model.heads}; let 'heads' divide 'width'."
        )
    if isinstance(model, VisionTransformer) and any(side % model.patch for side in model.image_shape[:2]):
        height, width, _ = model.image_shape
        return (
            f"config.model.patch is {model.patch} and the images are {height} x {width}; let it divide both."
        )
    return None
