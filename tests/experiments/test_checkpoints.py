"""Checkpoints that are damaged, folders that are in use, another's or full, and what of a run is then left."""

from __future__ import annotations

import errno
import io
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from kfe_optax.experiments import checkpoints as checkpoints_lib
from kfe_optax.experiments.checkpoints import Checkpoints
from kfe_optax.experiments.checksums import find_damage, write_checksums
from kfe_optax.experiments.compare import compare
from kfe_optax.experiments.diagnose import diagnose
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import TrainState
from kfe_optax.experiments.main import main
from kfe_optax.experiments.records import Recorder
from kfe_optax.experiments.sweep import sweep
from kfe_optax.experiments.train import train
from kfe_optax.experiments.workdirs import claimed

from .test_train import loss_curve

CONFIG = ConfigDict({"seed": 0, "optimizer": "adam", "adam": {"b1": 0.9}})
FINGERPRINT = 17


def state_of(step: int) -> TrainState:
    """A state whose arrays are many times 200 bytes, and another at every step."""
    weights = jax.random.normal(jax.random.key(step), (40, 30))
    opt_state = optax.scale_by_adam().init({"w": weights})
    return TrainState({"w": weights}, opt_state, jnp.int32(step), {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with checkpoints of the steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, CONFIG, FINGERPRINT) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state_of(step), float(step))
    return workdir


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def overwrite(path):
    content = bytearray(path.read_bytes())
    count = min(200, len(content))
    start = (len(content) - count) // 2
    content[start : start + count] = bytes(byte ^ 0x5A for byte in content[start : start + count])
    path.write_bytes(content)


DAMAGES = {
    "overwritten": overwrite,
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
}


def restored(workdir, config=CONFIG):
    with Checkpoints(workdir, config, FINGERPRINT) as checkpoints:
        found = checkpoints.restore(state_of(0))
        return found, checkpoints.latest_step()


def test_a_whole_checkpoint_is_restored(copy):
    found, latest = restored(copy)
    assert (found.step, found.seconds, latest, found.damaged) == (4, 4.0, 4, ())
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(4))


def test_of_a_damaged_checkpoint_the_older_one_is_taken(run, tmp_path):
    """Every file of the newest one, each with one of four damages; and folders that are empty or gone."""
    newest = run / "checkpoints" / "4"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) > 10
    for number, name in enumerate(files):
        damage = list(DAMAGES)[number % len(DAMAGES)]
        copy = shutil.copytree(run, tmp_path / str(number))
        DAMAGES[damage](copy / "checkpoints" / "4" / name)
        found, latest = restored(copy)
        assert (found.step, latest) == (2, 2), (damage, name)
        jax.tree.map(np.testing.assert_array_equal, found.state, state_of(2))
        (words,) = found.damaged
        assert words.startswith("the checkpoint of step 4 (")
        assert (copy / "damaged_checkpoint_4").is_dir()
        assert not (copy / "checkpoints" / "4").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["largest", "checksums"])
def test_every_damage_to_the_arrays_and_to_the_checksums(copy, damage, kind):
    newest = copy / "checkpoints" / "4"
    largest = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    DAMAGES[damage](largest if kind == "largest" else newest / "checksums.json")
    assert restored(copy)[0].step == 2


@pytest.mark.parametrize("part", ["", "state", "run", "state/d", "state/ocdbt.process_0"])
def test_folders_that_are_empty(copy, part):
    folder = copy / "checkpoints" / "4" / part
    shutil.rmtree(folder)
    folder.mkdir()
    assert restored(copy)[0].step == 2


def test_damaged_checkpoints_are_written_again_and_kept(copy):
    for number in (1, 2):
        overwrite(copy / "checkpoints" / "4" / "run" / "metadata")
        assert restored(copy)[0].step == 2
        with Checkpoints(copy, CONFIG, FINGERPRINT) as checkpoints:
            checkpoints.save(4, state_of(4), 4.0)
        assert len(list(copy.glob("damaged_checkpoint_4*"))) == number
        assert find_damage(copy / "checkpoints" / "4") is None
    assert restored(copy)[0].step == 4


def test_without_a_whole_checkpoint_nothing_is_touched(copy):
    for step in (2, 4):
        overwrite(copy / "checkpoints" / str(step) / "run" / "metadata")
    before = sorted(copy.rglob("*"))
    sentence = r"No checkpoint in .* is whole \(of that of step 4, 'run/metadata' has changed since"
    with pytest.raises(ExperimentError, match=sentence):
        restored(copy)
    assert sorted(copy.rglob("*")) == before


def test_a_changed_setting_puts_no_damaged_checkpoint_aside(copy):
    overwrite(copy / "checkpoints" / "4" / "run" / "metadata")
    other = ConfigDict({**CONFIG.to_dict(), "seed": 1})
    with pytest.raises(ExperimentError, match=r"made with config.seed = 0, and it is 1 now"):
        restored(copy, other)
    assert (copy / "checkpoints" / "4").is_dir()


def test_a_whole_checkpoint_of_another_program_is_one_sentence(copy):
    with Checkpoints(copy, CONFIG, FINGERPRINT) as checkpoints:
        other = state_of(0)._replace(params={"v": jnp.ones(3)})
        with pytest.raises(ExperimentError, match=r"step 4 in .* is whole and does not fit this program"):
            checkpoints.restore(other)


def test_checkpoints_that_cannot_be_written_are_one_sentence(copy, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints_lib, "write_checksums", full)
    with (
        Checkpoints(copy, CONFIG, FINGERPRINT) as checkpoints,
        pytest.raises(ExperimentError, match=r"step 6 cannot be written .* \(.*No space left on device\)"),
    ):
        checkpoints.save(6, state_of(6), 6.0)
    monkeypatch.undo()
    assert restored(copy)[0].step == 4  # the one whose writing was cut off is no checkpoint


@pytest.mark.parametrize("name", ["6", "6.orbax-checkpoint-tmp", "4 (copy)", "notes"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "checkpoint"])
def test_what_else_may_lie_among_checkpoints(copy, name, kind):
    place = copy / "checkpoints" / name
    if kind == "file":
        place.write_text("notes")
    elif kind == "folder":
        place.mkdir()
    elif kind == "link":
        place.symlink_to("/nowhere")
    else:  # of another step than its name says
        shutil.copytree(copy / "checkpoints" / "4", place)
    assert restored(copy)[0].step == 4
    with Checkpoints(copy, CONFIG, FINGERPRINT) as checkpoints:
        checkpoints.save(5, state_of(5), 5.0)
    assert restored(copy)[0].step == 5


def test_checksums_name_what_is_wrong(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(bytes(3 * 2**20))
    assert "it has no 'checksums.json'" in (find_damage(tmp_path) or "")
    write_checksums(tmp_path)
    assert find_damage(tmp_path) is None
    (tmp_path / "inner" / "file").write_bytes(bytes(3 * 2**20 - 1) + b"\1")
    assert find_damage(tmp_path) == "'inner/file' has changed since it was written"
    (tmp_path / "inner" / "file").unlink()
    assert find_damage(tmp_path) == "'inner/file' is missing or cannot be read"
    (tmp_path / "checksums.json").write_text("[1]")
    assert find_damage(tmp_path) == "its 'checksums.json' cannot be read"


def test_a_run_with_a_damaged_checkpoint_ends_as_without(tiny_config, tmp_path):
    tiny_config.optimizer, tiny_config.checkpoint_every = "adam", 2
    whole = train(tiny_config, tmp_path / "whole", console=Console(quiet=True))
    workdir = tmp_path / "run"
    tiny_config.steps = 4
    train(tiny_config, workdir, console=Console(quiet=True))
    files = (path for path in (workdir / "checkpoints" / "4").rglob("*") if path.is_file())
    overwrite(max(files, key=lambda path: path.stat().st_size))
    tiny_config.steps, said = 6, io.StringIO()
    resumed = train(tiny_config, workdir, resume=True, console=Console(file=said))
    assert "damaged    the checkpoint of step 4 (" in said.getvalue()
    assert "resumed    at step 2" in said.getvalue()
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    assert loss_curve(workdir) == loss_curve(tmp_path / "whole")


def test_a_full_disk_while_a_record_is_written_leaves_a_checkpoint(
    tiny_config_file, tmp_path, monkeypatch, capsys
):
    original = Recorder.write

    def full_at_three(self, record):
        if record["step"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, record)

    arguments = [
        "train",
        f"--config={tiny_config_file}",
        "--config.optimizer=adam",
        f"--workdir={tmp_path}/run",
    ]
    monkeypatch.setattr(Recorder, "write", full_at_three)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "kfe-optax: a file or a stream cannot be used ([Errno 28] No space left on device)"
    )
    assert error.count("\n") == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0
    assert [step for step, _ in loss_curve(tmp_path / "run")] == ["1", "2", "4", "5", "6"]


def test_rows_stand_until_their_copy_is_written(tmp_path):
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3):
            recorder.write({"step": step, "loss": 0.5})
    before = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv.new").mkdir()  # in its place nothing can be written
    with pytest.raises(OSError, match="metrics.csv.new"):
        Recorder(tmp_path, resume_at=2)
    assert (tmp_path / "metrics.csv").read_text() == before


def test_an_error_is_not_hidden_by_files_that_cannot_be_closed(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path)
    monkeypatch.setattr(recorder, "_file", open("/dev/full", "w"))  # noqa: SIM115
    recorder._file.write("x")
    with pytest.raises(KeyError, match="first"), recorder:
        raise KeyError("first")


def test_a_folder_is_held_by_one_process(tmp_path):
    with claimed(tmp_path / "run", "train", ("metrics.csv",)) as folder:
        (folder / "metrics.csv").write_text("mine")
        with (
            pytest.raises(
                ExperimentError, match=rf"in use by another run of 'train' \(process {os.getpid()}\)"
            ),
            claimed(tmp_path / "run", "train", ("metrics.csv",)),
        ):
            pass
        with claimed(tmp_path / "run", "compare", ("compare.csv",)):  # whose files are others
            pass
    with claimed(tmp_path / "run", "train", ("metrics.csv",)) as folder:
        assert (folder / "metrics.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (train, "metrics.csv"),
        (train, "config.txt"),
        (train, "checkpoints"),
        (compare, "compare.csv"),
        (sweep, "best.py"),
        (diagnose, "diagnose.png"),
    ],
)
def test_files_of_others_are_not_overwritten(tiny_config, tmp_path, command, name):
    tiny_config.optimizer = tiny_config.compare.optimizers = "adam"
    tiny_config.sweep.damping = ""
    (tmp_path / name).write_text("another's")
    with pytest.raises(
        ExperimentError, match=rf"holds '{name}' and no '{command.__name__}.run', the mark of a run"
    ):
        command(tiny_config, tmp_path, console=Console(quiet=True))
    assert (tmp_path / name).read_text() == "another's"
    assert {path.name for path in tmp_path.iterdir()} - {"tiny.py"} == {name}


@pytest.mark.parametrize("workdir", ["/proc/run", "/dev/null/run", "x" * 300, "~no_such_user/run", "a\0b"])
def test_folders_that_cannot_be_written_to_are_one_sentence(tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExperimentError, match="Cannot write to --workdir"), claimed(workdir, "train", ()):
        pass


def test_a_folder_without_permission_is_one_sentence(tmp_path, monkeypatch):
    def refused(path, *arguments, **options):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("pathlib.Path.open", refused)
    sentence = r"Cannot write to --workdir .* \(Read-only file system\)"
    with pytest.raises(ExperimentError, match=sentence), claimed(tmp_path, "train", ()):
        pass
