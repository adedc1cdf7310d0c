"""What stays in checkpoints/, and that it is never half there."""

from pathlib import Path

import pytest

from rlzoo.callbacks import Checkpoint
from rlzoo.callbacks.checkpoint import point
from rlzoo.errors import UserError
from rlzoo.models.checkpoints import kind_of, read_state, saved_by


def boundary(checkpoint: Checkpoint, step: int, score: float | None, folder: bool = False) -> None:
    """As at a boundary: the score is judged, then what was written aside is published."""
    name, weights = f"step_{step:06d}.ckpt", f"weights_{step:06d}.ckpt"
    partial = checkpoint.folder / f"{name}.partial"
    checkpoint.folder.mkdir(exist_ok=True)
    if checkpoint.ranked(score, weights):
        (checkpoint.folder / weights).write_text(str(step))
        checkpoint.point_to_best()
    if folder:
        partial.mkdir()
        (partial / "shard").write_text(str(step))
    else:
        partial.write_text(str(step))
    checkpoint.kept[name] = [best for _, best in checkpoint.best]
    checkpoint.publish(partial)


def names(checkpoint: Checkpoint) -> list[str]:
    found = [*checkpoint.folder.glob("step_*"), *checkpoint.folder.glob("weights_*")]
    return sorted(path.name for path in found)


@pytest.mark.parametrize("folder", [False, True])
def test_the_last_and_the_best_are_kept_and_links_point_to_them(tmp_path, folder):
    checkpoint = Checkpoint(str(tmp_path), keep_best=2)
    for step, score in enumerate([0.3, 0.5, None, 0.4, 0.1, None], start=1):
        boundary(checkpoint, step, score, folder)
    assert names(checkpoint) == ["step_000006.ckpt", "weights_000002.ckpt", "weights_000004.ckpt"]
    assert (checkpoint.folder / "last.ckpt").resolve().name == "step_000006.ckpt"
    assert (checkpoint.folder / "best.ckpt").resolve().name == "weights_000002.ckpt"
    boundary(checkpoint, 6, 0.9, folder)  # once more, as a resumed run may
    assert names(checkpoint) == ["step_000006.ckpt", "weights_000002.ckpt", "weights_000006.ckpt"]
    assert (checkpoint.folder / "best.ckpt").resolve().name == "weights_000006.ckpt"


@pytest.mark.parametrize(
    ("every", "every_seconds", "step", "seconds", "due"),
    [
        (2, None, 4, 0.0, True),
        (2, None, 5, 9e9, False),
        (None, 1800.0, 4, 1799.0, False),
        (None, 1800.0, 5, 1800.0, True),
        (8, 60.0, 5, 61.0, True),  # whichever comes first
        (8, 60.0, 8, 0.0, True),
        (None, None, 8, 9e9, False),
    ],
)
def test_steps_or_seconds_make_a_checkpoint_due(every, every_seconds, step, seconds, due):
    assert Checkpoint("x", every, every_seconds).due(step, seconds) == due


def test_without_a_metric_only_the_last_is_kept(tmp_path):
    checkpoint = Checkpoint(str(tmp_path), monitor=None)
    for step in (1, 2, 3):
        boundary(checkpoint, step, 0.5)
    assert names(checkpoint) == ["step_000003.ckpt"]
    assert not (checkpoint.folder / "best.ckpt").exists()


def test_a_link_is_moved_in_one_step_even_over_one_that_a_kill_left_aside(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    point(tmp_path / "last.ckpt", "a")
    (tmp_path / "last.ckpt.partial").symlink_to("nowhere")
    point(tmp_path / "last.ckpt", "b")
    assert (tmp_path / "last.ckpt").read_text() == "b"
    assert not (tmp_path / "last.ckpt.partial").is_symlink()


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    import pickle

    class Harm:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "harmed",))

    path = tmp_path / "bad.ckpt"
    path.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(Exception, match="(?i)weights.?only|zip|load"):
        read_state(path)
    assert not (tmp_path / "harmed").exists()


def test_what_is_no_checkpoint_of_this_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a file"):
        kind_of(tmp_path)
    with pytest.raises(UserError, match="init_from"):
        saved_by({"callbacks": {"Checkpoint": {"format": 1}}})


def judged(checkpoint: Checkpoint, step: int, score: float) -> None:
    """A boundary at which no checkpoint is due."""
    weights = f"weights_{step:06d}.ckpt"
    if checkpoint.ranked(score, weights):
        (checkpoint.folder / weights).write_text(str(step))
        checkpoint.point_to_best()


def test_the_best_that_a_checkpoint_names_is_there_when_a_killed_run_goes_on_from_it(tmp_path):
    checkpoint = Checkpoint(str(tmp_path))
    boundary(checkpoint, 8, 0.5)
    best = list(checkpoint.best)
    judged(checkpoint, 12, 0.6)  # killed after it
    resumed = Checkpoint(str(tmp_path))
    resumed.best = best
    resumed.point_to_best()
    boundary(resumed, 16, 0.1)
    assert (resumed.folder / "best.ckpt").read_text() == "8"
    assert names(resumed) == ["step_000016.ckpt", "weights_000008.ckpt"]


def test_a_thread_that_is_late_leaves_the_best_since_then(tmp_path):
    checkpoint = Checkpoint(str(tmp_path))
    boundary(checkpoint, 8, 0.5)
    (checkpoint.folder / "step_000010.ckpt.partial").write_text("10")
    checkpoint.kept["step_000010.ckpt"] = ["weights_000008.ckpt"]
    judged(checkpoint, 12, 0.6)
    checkpoint.publish(checkpoint.folder / "step_000010.ckpt.partial")
    assert (checkpoint.folder / "best.ckpt").read_text() == "12"
