"""The examples: their mathematics against automatic derivatives, finite differences and NumPy; their layers; their programs."""

from __future__ import annotations

import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfe_optax as kfe
from benchmarks import physics
from benchmarks.today.tasks import OPTIMIZERS
from examples import cartpole, digits, dqn, graph, heat, helium, lora, poisson, ppo, race, vae

from .dense import assert_close


def test_poisson_carries_the_laplacian(x64):
    params = jax.jit(poisson.init, static_argnums=1)(jax.random.key(0), (2, 5, 4, 1))
    params = jax.tree.map(lambda w: np.asarray(w) + 0.1, params)
    points = jax.jit(poisson.sample, static_argnums=(1, 2))(jax.random.key(1), 6, 3)
    h = np.zeros((6, 4, 2))
    h[:, 0], h[:, 1:3] = points.inside, np.eye(2)

    def value(point):
        return poisson.network(params, point[None, None])[0, 0]

    found = np.asarray(jax.jit(poisson.network)(params, h))
    derivatives = [jax.vmap(f) for f in (value, jax.grad(value), jax.hessian(value))]
    values, slopes, hessians = jax.jit(lambda x: [f(x) for f in derivatives])(points.inside)
    assert_close(found[:, 0], values, 1e-12)
    assert_close(found[:, 1:3], slopes, 1e-12)
    assert_close(found[:, 3], np.trace(hessians, axis1=1, axis2=2), 1e-12)
    assert list(kfe.find_layers(poisson.loss_fn, params, points)) == ["dense_0", "dense_1", "dense_2"]


def test_poisson_is_solved_by_its_solution(x64):
    points = jax.jit(poisson.sample, static_argnums=(1, 2))(jax.random.key(1), 6, 8)
    hessians = jax.jit(jax.vmap(jax.hessian(lambda p: poisson.solution(p[None])[0])))(points.inside)
    source, edge = jax.jit(lambda points: (poisson.source(points.inside), poisson.solution(points.edge)))(
        points
    )
    assert_close(-np.trace(hessians, axis1=1, axis2=2), source, 1e-12)
    np.testing.assert_allclose(edge, 0, atol=1e-15)
    assert {0.0, 1.0} <= set(np.asarray(points.edge).ravel())


def test_helium(x64):
    """Exchange, the local energy by finite differences, and the gradient that its docstring promises."""
    params = jax.jit(lambda key: helium.init(key, width=6, terms=2))(jax.random.key(0))
    walkers = jax.jit(helium.start, static_argnums=2)(params, jax.random.key(1), 16)
    log_amplitude = jax.jit(helium.log_amplitude)
    log_psi = log_amplitude(params, walkers)
    assert_close(log_amplitude(params, walkers[:, ::-1]), log_psi, 1e-12)

    flat, step = np.asarray(walkers).reshape(16, 6), 1e-4
    slope, laplacian = np.zeros((16, 6)), np.zeros(16)
    for i, unit in enumerate(step * np.eye(6)):
        up, down = (log_amplitude(params, (flat + sign * unit).reshape(16, 2, 3)) for sign in (1, -1))
        slope[:, i], laplacian = (up - down) / (2 * step), laplacian + (up - 2 * log_psi + down) / step**2
    radius = np.linalg.norm(flat.reshape(16, 2, 3), axis=-1)
    potential = -2 * (1 / radius).sum(-1) + 1 / np.linalg.norm(flat[:, :3] - flat[:, 3:], axis=-1)
    energies = jax.jit(helium.local_energies)(params, walkers)
    assert_close(energies, -(laplacian + (slope**2).sum(-1)) / 2 + potential, 1e-5)

    assert list(kfe.find_layers(helium.loss_fn, params, walkers, energies)) == ["own", "both", "orbitals"]
    clipped = np.clip(energies, -3.5, -2.5)  # so narrow that nothing is drawn in
    jacobian = jax.jit(jax.jacobian(helium.log_amplitude))(params, walkers)
    expected = jax.tree.map(lambda j: np.tensordot(clipped - clipped.mean(), j, 1) / 16, jacobian)
    assert_close(jax.jit(jax.grad(helium.loss_fn))(params, walkers, clipped), expected, 1e-10)


BOUNDS = {"poisson": 0.25, "helium": 0.02}
RUNS = [(problem, name) for problem in BOUNDS for name in ("kfac", "ekfac", "spectral_kfac")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "name"),
    [pytest.param(*run, marks=[] if run == ("poisson", "ekfac") else pytest.mark.nightly) for run in RUNS],
)
def test_default_settings_converge(problem, name):
    """At the recommended rate; where the scale of EKFAC is that of squared mean gradients it ends at an error of 2."""
    recipe = OPTIMIZERS[name]
    found, _ = physics.train(physics.PROBLEMS[problem]._replace(steps=150), recipe, recipe.unit, 0)
    assert np.abs(found[-1]) < BOUNDS[problem] < found[0]


def test_the_heat_equation(x64):
    """Its solution has no residual and meets what is known at the edge; the residual of another function by a Hessian."""
    points = jax.jit(heat.sample, static_argnums=(1, 2))(jax.random.key(0), 8, 8)
    residuals = jax.jit(jax.vmap(lambda point: heat.residual(heat.solution, point)))(points.inside)
    np.testing.assert_allclose(residuals, 0, atol=1e-12)
    first, sides = np.split(np.asarray(points.known), 2)
    assert set(sides[:, 0]) == {0.0, 1.0}
    assert not first[:, 1].any()
    solution = jax.jit(jax.vmap(heat.solution))
    np.testing.assert_allclose(solution(sides), 0, atol=1e-14)
    waves = np.sin(np.pi * first[:, 0]) + np.sin(3 * np.pi * first[:, 0]) / 2
    np.testing.assert_allclose(solution(first), waves, atol=1e-12)

    params = jax.jit(heat.init, static_argnums=1)(jax.random.key(1), (2, 4, 1))

    def function(point):
        return heat.network(params, point)

    @jax.jit
    def residuals_of(point):
        expected = jax.grad(function)(point)[1] - jax.hessian(function)(point)[0, 0]
        return heat.residual(function, point), expected

    np.testing.assert_allclose(*residuals_of(points.inside[0]), rtol=1e-12)
    assert list(kfe.find_layers(heat.loss_fn, params, points)) == ["dense_0", "dense_1"]


def test_the_divergence_of_the_autoencoder():
    """Against the integral of q log(q/p)."""
    mean, deviation = 0.7, 1.6
    z = np.linspace(-20, 20, 20001)
    q = np.exp(-(((z - mean) / deviation) ** 2) / 2) / (deviation * np.sqrt(2 * np.pi))
    logarithm = (z**2 - ((z - mean) / deviation) ** 2) / 2 - np.log(deviation)
    found = vae.divergence(jnp.array([[mean, 0.0]]), jnp.array([[2 * np.log(deviation), 0.0]]))
    np.testing.assert_allclose(found, [np.trapezoid(q * logarithm, z)], rtol=1e-5)


def test_adapters():
    """At first they change nothing; then the network is that of W + AB."""
    base = jax.jit(lora.init_base, static_argnums=1)(jax.random.key(0), (9, 6, 10))
    adapters = jax.jit(lora.init_adapters, static_argnums=2)(jax.random.key(1), base, 2)
    generator, network = np.random.default_rng(2), jax.jit(lora.network)
    images = generator.normal(size=(5, 3, 3)).astype(np.float32)
    np.testing.assert_array_equal(network(base, adapters, images), network(base, None, images))
    for adapter in adapters.values():
        adapter["b"] = generator.normal(size=adapter["b"].shape).astype(np.float32)
    merged = {
        name: {
            "kernel": np.asarray(layer["kernel"]) + np.asarray(adapters[name]["a"]) @ adapters[name]["b"],
            "bias": layer["bias"],
        }
        for name, layer in base.items()
    }
    found = np.asarray(network(base, adapters, images))
    assert_close(found, network(merged, None, images), 1e-5)
    assert np.abs(found - network(base, None, images)).max() > 0.1


@pytest.mark.slow
def test_the_base_stays_frozen():
    """Adapters alone are parameters, layers and state; all of them move, and the base does not."""
    base = jax.jit(lora.init_base, static_argnums=1)(jax.random.key(0), (784, 6, 10))
    adapters = jax.jit(lora.init_adapters, static_argnums=2)(jax.random.key(1), base, 2)
    batch = digits.load().batch(jax.random.key(2), 16)
    layers = kfe.find_layers(lora.loss_fn, adapters, base, batch)
    assert list(layers) == ["dense_0/a", "dense_0/b", "dense_1/a", "dense_1/b"]
    assert not layers.rest
    before, tx = jax.tree.map(np.array, base), kfe.spectral_kfac(0.1, layers)

    @jax.jit
    def step(adapters, opt_state, key):
        _, grads, taps = kfe.value_grad_and_taps(lora.loss_fn, layers)(adapters, base, batch, key=key)
        updates, opt_state = tx.update(grads, opt_state, adapters, taps=taps)
        return optax.apply_updates(adapters, updates), opt_state

    opt_state = jax.jit(tx.init)(adapters)
    for key in jax.random.split(jax.random.key(3), 3):
        adapters, opt_state = step(adapters, opt_state, key)
    jax.tree.map(np.testing.assert_array_equal, base, before)
    assert all(np.abs(adapter["b"]).max() > 1e-3 for adapter in adapters.values())


def test_bodies_attract_each_other(x64):
    """Each of two is drawn to the other by Newton's law, in a sum of all; a network does not depend on the order of bodies."""
    bodies = jax.jit(graph.sample, static_argnums=(1, 2))(jax.random.key(0), 3, 4)
    expected = np.zeros((3, 4, 2))
    places, masses = np.asarray(bodies.places), np.asarray(bodies.masses)
    for n, i, j in np.ndindex(3, 4, 4):
        between = places[n, j] - places[n, i]
        expected[n, i] += masses[n, j] * between / (between @ between + 0.3**2) ** 1.5
    assert_close(bodies.accelerations, expected, 1e-12)
    params = jax.jit(graph.init, static_argnums=(1, 2))(jax.random.key(1), 5, 3)
    order, network = np.array([2, 0, 3, 1]), jax.jit(graph.network)
    assert_close(
        network(params, places[:, order], masses[:, order]),
        np.asarray(network(params, places, masses))[:, order],
        1e-12,
    )
    assert set(kfe.find_layers(graph.loss_fn, params, bodies)) == set(params)


def test_cart_pole(x64):
    """A step against the two equations of motion, solved as a linear system; what ends begins again."""
    state = np.array([[0.1, -0.4, 0.12, 0.8], [-1.0, 2.0, -0.15, -1.5]])
    action = np.array([1, 0])
    found = np.asarray(jax.jit(cartpole.move)(state, action))
    for (_, speed, angle, turning), push, before, after in zip(
        state, (10.0, -10.0), state, found, strict=True
    ):
        sine, cosine, moment = np.sin(angle), np.cos(angle), 0.1 * 0.5
        # (M + m) x'' + m l cos θ θ'' = F + m l θ'² sin θ,  m l cos θ x'' + 4/3 m l² θ'' = m g l sin θ
        system = np.array([[1.1, moment * cosine], [moment * cosine, 4 / 3 * moment * 0.5]])
        forces = np.array([push + moment * turning**2 * sine, moment * 9.8 * sine])
        pulled, bent = np.linalg.solve(system, forces)
        assert_close(after, before + 0.02 * np.array([speed, pulled, turning, bent]), 1e-12)

    standing = np.array([[0.0, 0, 0, 0], [0, 0, 0.3, 0], [2.5, 0, 0, 0], [0, 0, 0, 0]])
    poles = cartpole.Poles(standing, np.array([3, 7, 8, 199]), np.zeros(4))
    step = jax.jit(cartpole.step)(poles, np.array([0, 1, 0, 1]), jax.random.key(0))
    following, after, down = jax.tree.map(np.asarray, step)
    assert list(np.asarray(down)) == [False, True, True, False]
    assert list(np.asarray(following.count)) == [4, 0, 0, 0]
    assert list(np.asarray(following.returns)) == [0, 8, 9, 200]
    assert (np.abs(after[1:3]).max(1) > 0.2).all()
    assert np.abs(following.state[1:]).max() <= 0.05


def test_the_targets_of_deep_q_learning(x64):
    init, values = jax.jit(dqn.init, static_argnums=1), jax.jit(dqn.values)
    params, target = (init(jax.random.key(i), 6) for i in range(2))
    states = np.random.default_rng(2).normal(size=(2, 5, 4))
    batch = dqn.Transitions(states[0], np.array([0, 1, 1, 0, 1]), states[1], np.array([False] * 4 + [True]))
    online, slow = (np.asarray(values(p, states[1])) for p in (params, target))
    expected = [1 + 0.98 * float(slow[i, np.argmax(online[i])]) for i in range(4)] + [1]
    assert_close(jax.jit(dqn.targets)(params, target, batch), np.array(expected), 1e-12)
    # No derivative passes through the target.
    fixed = jax.value_and_grad(
        lambda p: (
            ((dqn.values(p, states[0])[jnp.arange(5), batch.action] - np.array(expected)) ** 2).mean() / 2
        )
    )
    found = jax.jit(jax.value_and_grad(dqn.loss_fn))(params, target, batch)
    assert_close(found, jax.jit(fixed)(params), 1e-12)
    assert set(kfe.find_layers(dqn.loss_fn, params, target, batch)) == set(params)


def test_generalized_advantages(x64):
    """By their sum, which an episode's end cuts."""
    deltas, ends = np.random.default_rng(0).normal(size=(6, 2)), np.zeros((6, 2), bool)
    ends[2, 0] = True
    found = np.asarray(jax.jit(ppo.advantages)(deltas, ends))
    decay = (0.99 * 0.95) ** np.arange(6)
    assert_close(found[0], np.array([decay[:3] @ deltas[:3, 0], decay @ deltas[:, 1]]), 1e-12)
    assert_close(found[3, 0], decay[:3] @ deltas[3:, 0], 1e-12)


def ppo_case() -> tuple[Any, ppo.Rollout]:
    params = jax.jit(ppo.init, static_argnums=1)(jax.random.key(1), 5)
    params["policy_2"]["kernel"] *= 100
    state, action = np.random.default_rng(2).normal(size=(7, 4)), np.array([0, 1, 1, 0, 1, 0, 0])
    before = jax.jit(lambda p, s, a: ppo.log_probability(ppo.policy(p, s), a))(params, state, action)
    return params, ppo.Rollout(state, action, before, jnp.arange(-3.0, 4.0), jnp.arange(7.0))


def policy_gradient(params: Any, batch: ppo.Rollout) -> jax.Array:
    """The same without a ratio."""
    logits = ppo.policy(params, batch.state)
    chances = jax.nn.softmax(logits)
    squares = kfe.losses.l2_loss(ppo.value(params, batch.state), batch.returns)
    surrogate = kfe.losses.policy_gradient_loss(logits, batch.action, batch.advantage)
    return (surrogate + squares + 0.01 * (chances * jnp.log(chances)).sum(-1)).mean()


def test_the_gradient_of_proximal_policy_optimization(x64):
    """That of a policy gradient at ρ = 1, and nothing of it where the ratio is clipped."""
    params, batch = ppo_case()
    found, expected = jax.jit(jax.grad(ppo.loss_fn)), jax.jit(jax.grad(policy_gradient))
    assert_close(found(params, batch), expected(params, batch), 1e-10)
    far = batch._replace(log_probability=batch.log_probability - 1, advantage=jnp.ones(7))
    assert_close(found(params, far), expected(params, batch._replace(advantage=jnp.zeros(7))), 1e-10)
    assert set(kfe.find_layers(ppo.loss_fn, params, batch)) == set(params)


@pytest.mark.slow
def test_the_curvature_of_proximal_policy_optimization(x64):
    """That of the policy and of the values, as `policy_gradient_loss` has it."""
    params, batch = ppo_case()
    updates = []
    for loss_fn in (ppo.loss_fn, policy_gradient):
        layers = kfe.find_layers(loss_fn, params, batch)
        tx = kfe.scale_by_kfac(layers, 1e-3)

        @jax.jit
        def update(params, loss_fn=loss_fn, layers=layers, tx=tx):
            _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="exact")(params, batch)
            return tx.update(grads, tx.init(params), params, taps=taps)[0]

        updates.append(update(params))
    assert_close(*updates, 1e-8)


TINY: dict[str, tuple[dict[str, int], set[str]]] = {
    "helium": ({}, {"own", "both", "orbitals"}),
    "poisson": ({}, {"dense_0", "dense_1", "dense_2", "dense_3"}),
    "heat": ({}, {"dense_0", "dense_1", "dense_2", "dense_3"}),
    "vae": (
        {"width": 8, "latents": 2},
        {"encoder/hidden", "encoder/mean", "encoder/log_variance", "decoder/hidden", "decoder/pixels"},
    ),
    "lora": ({"base_steps": 1}, {f"dense_{i}/{part}" for i in range(3) for part in "ab"}),
    "graph": ({}, {"edge_0", "edge_1", "edge_2", "node_0", "node_1"}),
    "dqn": ({"capacity": 8, "batch": 8}, {"dense_0", "dense_1", "dense_2"}),
    "ppo": (
        {"environments": 4, "length": 4, "minibatches": 2},
        {f"{head}_{i}" for head in ("policy", "value") for i in range(3)},
    ),
    "equinox_classifier": ({"channels": 2}, {"convolutions/0", "convolutions/1", "out"}),
    "haiku_classifier": (
        {"width": 4, "depth": 1, "heads": 1},
        {"patches", "attention_0/query", "mlp_0/~/linear_0", "out"},
    ),
    "characters_nnx": (
        {"width": 4, "depth": 1, "heads": 1, "length": 8},
        {"tokens", "places", "blocks/0/attention/query", "blocks/0/hidden", "out"},
    ),
    "gpt2": (
        {"width": 4, "depth": 1, "heads": 1, "length": 8},
        {"transformer/wte", "transformer/h/0/attn/c_attn"},
    ),
}


@pytest.mark.parametrize(
    "name", [name if name == "dqn" else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)
def test_program(name, tmp_path, capsys):
    """At a tiny size: the layers, a line for each twentieth, a table with both optimizers, and a picture."""
    for word, package in {"equinox": "equinox", "haiku": "haiku", "gpt2": "transformers"}.items():
        if name.startswith(word):
            pytest.importorskip(package)
    module: Any = importlib.import_module(f"examples.{name}")
    sizes, names = TINY[name]
    out = tmp_path / "x.png"
    arguments = ["--steps", "3", "--optimizers", "adam", "spectral_kfac", "--out", str(out)]
    problem = module.PROBLEM._replace(**sizes)
    best = race.main(
        name,
        module.TITLE,
        problem,
        module.RATES[:1],
        module.PROBLEM.unit.startswith("mean return"),
        arguments=arguments,
    )
    printed = capsys.readouterr().out
    found = set(re.findall(r"^(\S+) +(?:dense|conv|norm|embedding)", printed, re.MULTILINE))
    assert names <= found, found
    progress = re.findall(r"^  step +(\d+): (\S+)$", printed, re.MULTILINE)
    assert [int(step) for step, _ in progress] == [1, 2, 3] * 2
    values = np.array([float(value) for _, value in progress]).reshape(2, 3)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values[:, 0], values[0, 0], rtol=1e-4)  # the same beginning
    assert set(best) == {"adam", "spectral_kfac"}
    table = printed[printed.index("last twentieth") :]
    rows = re.findall(r"^(adam|spectral_kfac), (\S+) +(\S+) ", table, re.MULTILINE)
    assert [row[0] for row in rows] == ["adam", "spectral_kfac"]
    np.testing.assert_allclose([float(row[2]) for row in rows], values[:, -1], rtol=1e-3)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_best_of_adam_is_shown(monkeypatch, tmp_path):
    """The least by default, the largest of returns, and never one that is not finite."""
    lasts = {1e-3: 2.0, 3e-3: 1.0, 1e-2: np.nan, 3e-2: 3.0}
    drawn = {}
    monkeypatch.setattr(race, "begin", lambda *_: (None, None, "no layers"))
    monkeypatch.setattr(race, "train", lambda _, __, rate, *___, **____: (np.array([5.0, lasts[rate]]), 1.0))
    monkeypatch.setattr(race, "draw", lambda *given: drawn.update(given[2]))
    arguments = ["--optimizers", "adam", "--out", str(tmp_path / "x.png")]
    for larger, label, last in ((False, "adam, 0.003", 1.0), (True, "adam, 0.03", 3.0)):
        drawn.clear()
        found = race.main("x", "x", vae.PROBLEM, tuple(lasts), larger, arguments=arguments)
        assert (list(drawn), found) == ([label], {"adam": last})


def test_line_searches_keep_their_draw():
    """L-BFGS goes down on the points of its first step; the others see new ones."""

    class Square(poisson.Poisson):
        def start(self, key):
            return jnp.zeros(()), jnp.zeros(())

        def arguments(self, params, carried, key):
            drawn = jax.random.normal(key)
            return (drawn,), drawn

        def loss_fn(self, params, drawn):
            return kfe.losses.l2_loss((params - drawn)[None]).mean()

        def measure(self, params, carried, loss):
            return carried

    draws = {name: race.train(Square(4), race.OPTIMIZERS[name], 0.1, 0)[0] for name in ("adam", "lbfgs")}
    assert len(set(draws["lbfgs"])) == 1
    assert len(set(draws["adam"])) == 4
