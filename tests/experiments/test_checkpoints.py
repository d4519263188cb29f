"""Checkpoints that are damaged, folders that are in use, another's or full, and what of a run is then left."""

from __future__ import annotations

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from kfe_optax.experiments import checkpoints as checkpoints_lib
from kfe_optax.experiments.checkpoints import Checkpoints
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.job import TrainState
from kfe_optax.experiments.main import main
from kfe_optax.experiments.records import Recorder
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
    (state, step, seconds), latest = restored(copy)
    assert (step, seconds, latest) == (4, 4.0, 4)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(4))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_one_sentence_and_without_it_the_older_one_is_taken(copy, damage):
    newest = copy / "checkpoints" / "4"
    DAMAGES[damage](newest / "run" / "metadata")
    with pytest.raises(ExperimentError, match=r"4' is damaged or .* remove it, and --resume takes the one"):
        restored(copy)
    shutil.rmtree(newest)
    (state, step, _), latest = restored(copy)
    assert (step, latest) == (2, 2)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(2))


def test_a_changed_setting_is_refused(copy):
    other = ConfigDict({**CONFIG.to_dict(), "seed": 1})
    with pytest.raises(ExperimentError, match=r"made with config.seed = 0, and it is 1 now"):
        restored(copy, other)
    with (
        Checkpoints(copy, CONFIG, FINGERPRINT + 1) as checkpoints,
        pytest.raises(ExperimentError, match="made with other training images"),
    ):
        checkpoints.restore(state_of(0))


def test_a_whole_checkpoint_of_another_program_is_one_sentence(copy):
    with Checkpoints(copy, CONFIG, FINGERPRINT) as checkpoints:
        other = state_of(0)._replace(params={"v": jnp.ones(3)})
        with pytest.raises(ExperimentError, match=r"4' is damaged or does not fit this program"):
            checkpoints.restore(other)


def test_checkpoints_that_cannot_be_written_are_one_sentence(copy, monkeypatch):
    def full(*given, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints_lib.ocp.CheckpointManager, "save", full)
    with (
        Checkpoints(copy, CONFIG, FINGERPRINT) as checkpoints,
        pytest.raises(ExperimentError, match=r"step 6 cannot be written .* \(.*No space left on device\)"),
    ):
        checkpoints.save(6, state_of(6), 6.0)
    monkeypatch.undo()
    assert restored(copy)[0][1] == 4


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
    if name == "6" and kind in ("folder", "checkpoint"):
        with pytest.raises(ExperimentError, match="6' is damaged or does not|6' holds step 4; remove that"):
            restored(copy)
        shutil.rmtree(place)
    assert restored(copy)[0][1] == 4
    with Checkpoints(copy, CONFIG, FINGERPRINT) as checkpoints:
        checkpoints.save(5, state_of(5), 5.0)
    assert restored(copy)[0][1] == 5


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
    with claimed(tmp_path / "run", "train") as folder:
        (folder / "metrics.csv").write_text("mine")
        with (
            pytest.raises(ExperimentError, match="in use by another run of 'train'"),
            claimed(tmp_path / "run", "train"),
        ):
            pass
        with claimed(tmp_path / "run", "compare"):  # whose files are others
            pass
    with claimed(tmp_path / "run", "train") as folder:
        assert (folder / "metrics.csv").read_text() == "mine"


@pytest.mark.parametrize("workdir", ["/proc/run", "/dev/null/run", "x" * 300, "~no_such_user/run", "a\0b"])
def test_folders_that_cannot_be_written_to_are_one_sentence(tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExperimentError, match="Cannot write to --workdir"), claimed(workdir, "train"):
        pass


def test_a_folder_without_permission_is_one_sentence(tmp_path, monkeypatch):
    def refused(path, *arguments, **options):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("pathlib.Path.open", refused)
    sentence = r"Cannot write to --workdir .* \(Read-only file system\)"
    with pytest.raises(ExperimentError, match=sentence), claimed(tmp_path, "train"):
        pass
