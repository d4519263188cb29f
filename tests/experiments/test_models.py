"""The models: the published numbers of parameters, initial kernels, causality, and what make_model refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from kfe_optax.experiments.data import planted_targets
from kfe_optax.experiments.dataset import Dataset
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.models import make_model
from kfe_optax.experiments.settings import base_config
from kfe_optax.experiments.task import make_task

IMAGE_SHAPE = (32, 32, 3)


def image_data(shape=IMAGE_SHAPE, count=2):
    images = np.zeros((count, int(np.prod(shape))), np.float32)
    labels = np.arange(count, dtype=np.int32)
    return Dataset(images, labels, images, labels, "made up", tuple(shape))


def text_data(length=7, vocabulary=11, count=3):
    tokens = np.random.default_rng(0).integers(0, vocabulary, (count, length + 1)).astype(np.int32)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    return Dataset(inputs, labels, inputs, labels, "made up", (length,), vocabulary)


def model_of(dataset=None, **settings):
    return make_model(ConfigDict(settings), dataset or image_data())


def initial(model, inputs):
    """The parameters, by one compiled program."""
    return jax.jit(model.init)(jax.random.key(0), inputs)["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Without batch norm a channel has a bias where it had a scale and a shift: one parameter fewer.
@pytest.mark.parametrize(
    ("settings", "parameters", "channels"),
    [
        ({"kind": "vgg", "depth": 11}, 9_228_362, 2752),
        ({"kind": "vgg", "depth": 16}, 14_724_042, 4224),
        ({"kind": "resnet", "depth": 18}, 11_173_962, 4800),
        ({"kind": "resnet", "depth": 34}, 21_282_122, 8512),
        ({"kind": "resnet", "depth": 20}, 272_474, 784),
        ({"kind": "resnet", "depth": 110}, 1_730_714, 4144),
    ],
)
def test_the_published_numbers_of_parameters(settings, parameters, channels):
    for batch_norm in (True, False):
        model = model_of(**settings, batch_norm=batch_norm)
        variables = jax.eval_shape(model.init, jax.random.key(0), image_data().train_images)
        assert count(variables["params"]) == parameters - (not batch_norm) * channels
        assert count(variables.get("batch_stats", {})) == 2 * batch_norm * channels


def test_a_network_with_norm_first_has_no_norm_on_its_shortcuts():
    model = model_of(kind="resnet", depth=18, pre_activation=True)
    params = jax.eval_shape(model.init, jax.random.key(0), image_data().train_images)["params"]
    # Against the other order: no norm behind the projections (128 + 256 + 512) and none behind the stem (64); norm 1 of
    # a stage's first block has its input's channels (64 + 128 + 256 for 128 + 256 + 512); and one before the mean (512).
    assert count(params) == 11_173_962 - 2 * (896 + 64 + 448 - 512)


@pytest.mark.parametrize("pre_activation", [pytest.param(False, marks=pytest.mark.slow), True])
def test_kernels_without_batch_norm_have_the_papers_variances(pre_activation):
    dataset = image_data((8, 8, 3))
    model = model_of(dataset, kind="resnet", depth=14, batch_norm=False, pre_activation=pre_activation)
    params = initial(model, dataset.train_images)

    def variance(layer):
        kernel = np.asarray(layer["kernel"])
        # Normal, not truncated: values beyond three standard deviations occur.
        return kernel.var() * np.prod(kernel.shape[:-1]), np.abs(kernel).max() / kernel.std()

    block = params["stage_3_block_2"]
    for layer, expected in ((block["conv_1"], 2.0), (block["conv_2"], 0.2)):
        found, extreme = variance(layer)
        assert found == pytest.approx(expected, rel=0.05)
        assert extreme > 3.5
        assert not np.any(layer["bias"])
    assert variance(params["stem"])[0] == pytest.approx(1.0, rel=0.3)
    assert variance(params["stage_3_block_1"]["projection"])[0] == pytest.approx(2.0, rel=0.15)
    assert variance(params["logits"])[0] == pytest.approx(2.0, rel=0.3)


def test_gray_images_of_another_size_pass_and_a_width_scales_every_layer():
    dataset = image_data((28, 28))
    for kind, depth, largest in (("vgg", 11, 64), ("resnet", 8, 8)):
        model = model_of(dataset, kind=kind, depth=depth, width=0.125, batch_norm=False, classes=3)
        outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), dataset.train_images)
        assert outputs.shape == (2, 3)
        sizes = {kernel.shape[-1] for kernel in jax.tree.leaves(variables) if kernel.ndim > 1}
        assert max(sizes) == largest


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "transformer", "width": 8, "depth": 2, "heads": 2, "hidden": 6},
        {"kind": "transformer", "width": 8, "depth": 2, "heads": 2, "hidden": 6, "scan": True, "tied": True},
        {"kind": "recurrent", "width": 5, "embedding": 4, "depth": 2},
        {"kind": "recurrent", "width": 5, "embedding": 4, "cell": "gru"},
    ],
    ids=lambda settings: "_".join(map(str, settings.values())),
)
def test_a_character_sees_those_before_it_and_no_other(settings):
    dataset = text_data()
    model = model_of(dataset, **settings)
    tokens = dataset.train_images
    params = initial(model, tokens)
    logits = model.apply({"params": params}, tokens)
    assert logits.shape == (3, 7, 11)
    changed = model.apply({"params": params}, np.where(np.arange(7) == 4, (tokens + 1) % 11, tokens))
    np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
    for place in (4, 5, 6):
        assert np.abs(logits[:, place] - changed[:, place]).min(-1).max() > 0


def test_a_loop_of_blocks_is_the_blocks_in_a_row():
    dataset = text_data()
    settings = {"kind": "transformer", "width": 8, "depth": 3, "heads": 2, "hidden": 6}
    tokens = dataset.train_images
    plain, loop = model_of(dataset, **settings), model_of(dataset, **settings, scan=True)
    params = initial(plain, tokens)
    blocks = [params[f"block_{index}"] for index in (1, 2, 3)]
    others = {name: own for name, own in params.items() if not name.startswith("block")}
    stacked = {**others, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
    shapes = jax.eval_shape(loop.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    np.testing.assert_allclose(
        loop.apply({"params": stacked}, tokens), plain.apply({"params": params}, tokens), atol=1e-6
    )


def test_a_tied_head_has_no_parameters_of_its_own():
    dataset = text_data()
    settings = {"kind": "transformer", "width": 8, "depth": 1, "heads": 2, "hidden": 6}
    untied, tied = (
        jax.eval_shape(
            model_of(dataset, **settings, tied=value).init, jax.random.key(0), dataset.train_images
        )["params"]
        for value in (False, True)
    )
    assert untied.keys() - tied.keys() == {"logits"}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"kind": "transformer", "width": 8, "depth": 2, "heads": 2, "hidden": 6, "scan": True},
            marks=pytest.mark.nightly,
        ),
        {"kind": "recurrent", "width": 5, "embedding": 4},
    ],
    ids=["transformer", "recurrent"],
)
def test_dropout_is_of_training_alone(settings):
    dataset = text_data()
    model = model_of(dataset, **settings, dropout=0.5)
    tokens = dataset.train_images
    params = initial(model, tokens)

    def trained(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, tokens, train=True, rngs=rngs)

    np.testing.assert_array_equal(trained(1), trained(1))
    assert np.abs(trained(1) - trained(2)).max() > 1e-3
    without = model_of(dataset, **settings).apply({"params": params}, tokens, train=True)
    np.testing.assert_array_equal(model.apply({"params": params}, tokens), without)


def test_patches_of_an_image_have_positions():
    model = model_of(kind="vision_transformer", patch=8, width=8, depth=1, heads=2, hidden=6)
    images = np.random.default_rng(0).normal(size=(2, 3072)).astype(np.float32)
    params = initial(model, images)
    assert params["positions"].shape == (16, 8)
    moved = np.roll(images.reshape(-1, *IMAGE_SHAPE), 8, axis=1).reshape(2, -1)
    outputs, rolled = (model.apply({"params": params}, x) for x in (images, moved))
    assert outputs.shape == (2, 10)
    assert np.abs(outputs - rolled).max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "dataset", "sentence"),
    [
        ({"kind": "perceptron"}, image_data(), "kind is 'perceptron'; choose one of autoencoder,"),
        (
            {"kind": "transformer"},
            image_data(),
            r"'transformer' is for texts, and the data \(made up\) are not",
        ),
        ({"kind": "vgg"}, text_data(), r"'vgg' is not for texts, and the data \(made up\) are"),
        ({"kind": "classifier"}, text_data(), "is not for texts"),
        ({"kind": "linear"}, image_data(), "is for targets, and the data"),
        ({"kind": "classifier"}, planted_targets(3, 2, 4, 2, 0.0), "is not for targets, and the data"),
        ({"kind": "vgg", "sizes": (3,)}, image_data(), "got an unexpected keyword argument 'sizes'"),
        ({"kind": "vgg", "image_shape": (3,)}, image_data(), "multiple values for .* 'image_shape'"),
        ({"kind": "resnet"}, image_data((3072,)), "rows of 3072 pixels without height and width"),
        ({"kind": "vgg", "depth": 12}, image_data(), "depth is '12'; choose one of 11, 16"),
        ({"kind": "resnet", "depth": 21}, image_data(), r"18, 34, or 6k \+ 2"),
        ({"kind": "recurrent", "cell": "rnn"}, text_data(), "cell is 'rnn'; choose one of lstm, gru"),
        ({"kind": "transformer", "heads": 3}, text_data(), "makes no network of these data: .*heads"),
        ({"kind": "classifier", "sizes": (8, 2)}, image_data(), r"sizes is \(8, 2\).*start with 3072"),
        ({"kind": "classifier", "sizes": (3072, 1)}, image_data(), "labels go up to 1 .* at least 2"),
        ({"kind": "resnet", "classes": 1}, image_data(), "labels go up to 1 .* at least 2"),
        ({"kind": "autoencoder", "sizes": (3072,)}, image_data(), "and that of an autoencoder end with it"),
        ({"kind": "autoencoder", "sizes": (3072, 3)}, image_data(), "and that of an autoencoder end with it"),
        (
            {"kind": "classifier", "sizes": (3072, 3, 2), "activation": "softsign"},
            image_data(),
            "choose one of relu, tanh",
        ),
        (
            {"kind": "classifier", "sizes": (3072, 2), "initializer": "zeros"},
            image_data(),
            "choose one of lecun_normal",
        ),
    ],
)
def test_mistakes_are_one_sentence(settings, dataset, sentence):
    config = base_config("mistaken")
    config.model = ConfigDict(settings)
    config.loss = "squared_error" if settings["kind"] == "autoencoder" else "softmax_cross_entropy"
    with pytest.raises(ExperimentError, match=sentence):
        jax.eval_shape(make_task(config, dataset).init, jax.random.key(0), dataset.train_images)
