"""The networks of the experiments: ordinary Flax models that know nothing of this library."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError, chosen, require
from kfe_optax.experiments.models.convolutional import VGG, ResNet
from kfe_optax.experiments.models.dense import Autoencoder, Classifier, LinearNetwork
from kfe_optax.experiments.models.sequences import CharacterTransformer, Recurrent, VisionTransformer

# A model's fields are those of config.model, but for what the data give: `image_shape`, (height, width, channels);
# `vocabulary` and `length`, which make it one of text; and `outputs`, which make it one of targets.
KINDS: dict[str, type[nn.Module]] = {
    "autoencoder": Autoencoder,
    "classifier": Classifier,
    "vgg": VGG,
    "resnet": ResNet,
    "vision_transformer": VisionTransformer,
    "transformer": CharacterTransformer,
    "recurrent": Recurrent,
    "linear": LinearNetwork,
}


def make_model(settings: ConfigDict, dataset: Dataset) -> nn.Module:
    """The model that ``config.model`` describes, checked against the data that it will see.

    Example::

        model = make_model(ConfigDict({"kind": "resnet", "depth": 20, "batch_norm": False}), dataset)

    Raises:
      ExperimentError: the settings name no model, or not one of these data.
    """
    kind = settings.kind
    model: Any = chosen("config.model.kind", kind, KINDS)
    needed = {field.name for field in dataclasses.fields(model)}
    given: dict[str, Any] = {"vocabulary": dataset.vocabulary, "outputs": dataset.outputs}
    for name, what in (("vocabulary", "texts"), ("outputs", "targets")):
        words = f"config.model.kind '{kind}' is {'not ' * (name not in needed)}for {what}"
        words += f", and the data ({dataset.source}) are{' not' * (not given[name])}"
        require(
            (name in needed) == bool(given[name]),
            f"{words}; change the kind, config.data.name or config.data_dir.",
        )
    given |= {"length": dataset.pixels, "image_shape": (*dataset.image_shape, 1)[:3]}
    words = f"The images of the data ({dataset.source}) are rows of {dataset.pixels} pixels without height and width"
    fits = "image_shape" not in needed or len(dataset.image_shape) > 1
    require(fits, f"{words}, which config.model.kind '{kind}' needs.")
    # Tuples, so that a model can be hashed.
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    del fields["kind"]
    try:
        made = model(**fields, **{name: value for name, value in given.items() if name in needed})
    except TypeError as error:
        raise ExperimentError(f"config.model does not fit its kind '{kind}': {error}.") from error
    pixels = dataset.pixels
    sizes = getattr(made, "sizes", (pixels, pixels))
    fits = len(sizes) > 1 and sizes[0] == pixels and (kind != "autoencoder" or sizes[-1] == pixels)
    words = f"The images have {pixels} pixels and config.model.sizes is {sizes}; let it start with {pixels}"
    require(fits, f"{words}, and that of an autoencoder end with it.")
    return made
