from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rlzoo.bench._equal import equal_but_time
from rlzoo.errors import UserError
from rlzoo.report.loggers import CSVLogger

CONF = Path(__file__).parent.parent / "conf"
ROWS = [
    {"rollout_step": 0, "val/avg_at_8": 0.25},
    {"rollout_step": 1, "reward": 0.1 + 0.2, "time/seconds": 1.5},
    {"rollout_step": 2, "reward": 1 / 3, "val/avg_at_8": 0.5, "time/seconds": 2.5},
    {"rollout_step": 3, "new": 1.0},
]


def write(run_dir: Path, rows: list[dict] = ROWS) -> CSVLogger:
    logger = CSVLogger(run_dir)
    for row in rows:
        logger.log_metrics(row, step=row.get("rollout_step"))
    logger.flush()
    return logger


def test_columns_stand_in_order_of_first_appearance_and_missing_cells_are_empty(tmp_path: Path):
    write(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == (
        "rollout_step,val/avg_at_8,reward,time/seconds,new\n"
        "0,0.25,,,\n"
        "1,,0.30000000000000004,1.5,\n"
        "2,0.5,0.3333333333333333,2.5,\n"
        "3,,,,1.0\n"
    )


def test_tensors_and_numpy_scalars_are_written_like_the_numbers_they_hold(tmp_path: Path):
    row = {"a": torch.tensor(3), "b": np.float64(0.1), "c": torch.tensor(0.5), "d": True, "e": None}
    write(tmp_path, [row])
    assert (tmp_path / "metrics.csv").read_text() == "a,b,c,d,e\n3,0.1,0.5,1,\n"


def test_every_float_reads_back_as_itself(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=100) * 10.0 ** np.arange(-50, 50)
    write(tmp_path, [{"x": float(value)} for value in values])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert [float(line) for line in lines] == values.tolist()


@pytest.mark.parametrize("saved_after", range(len(ROWS) + 1))
def test_a_resumed_file_is_byte_equal_to_an_uninterrupted_one(tmp_path: Path, saved_after: int):
    write(tmp_path / "whole")
    state = write(tmp_path / "cut", ROWS[:saved_after]).state_dict()
    write(tmp_path / "cut", [*ROWS[:saved_after], {"rollout_step": 99, "lost": 1.0}])
    with (tmp_path / "cut" / "metrics.csv").open("a") as file:
        file.write("100,0.")  # killed in the middle of a row

    resumed = CSVLogger(tmp_path / "cut")
    resumed.load_state_dict(state)
    for row in ROWS[saved_after:]:
        resumed.log_metrics(row)
    resumed.finalize("success")

    assert (tmp_path / "cut" / "metrics.csv").read_bytes() == (
        tmp_path / "whole" / "metrics.csv"
    ).read_bytes()
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["metrics.csv"]


def test_loading_a_state_cuts_the_file_at_once(tmp_path: Path):
    state = write(tmp_path, ROWS[:1]).state_dict()
    write(tmp_path)
    CSVLogger(tmp_path).load_state_dict(state)
    assert (tmp_path / "metrics.csv").read_text() == "rollout_step,val/avg_at_8\n0,0.25\n"


def test_loading_a_state_from_before_the_first_row_removes_the_file(tmp_path: Path):
    state = CSVLogger(tmp_path).state_dict()
    logger = write(tmp_path)
    logger.load_state_dict(state)
    assert not (tmp_path / "metrics.csv").exists()
    logger.log_metrics({"a": 1})
    assert (tmp_path / "metrics.csv").read_text() == "a\n1\n"


def older(state: dict) -> dict:
    """A state as it was before checkpoints held the cells."""
    return {name: state[name] for name in ("rows", "columns")}


def test_of_an_older_checkpoint_a_file_with_fewer_rows_is_refused(tmp_path: Path):
    state = older(write(tmp_path).state_dict())
    text = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(text[:-3])  # the last row, torn, no longer counts
    with pytest.raises(UserError, match="holds 3 rows .* saved after 4 rows"):
        CSVLogger(tmp_path).load_state_dict(state)


def test_of_an_older_checkpoint_a_missing_or_foreign_file_is_refused(tmp_path: Path):
    state = older(write(tmp_path).state_dict())
    CSVLogger(tmp_path).load_state_dict(state)
    with pytest.raises(UserError, match="holds 0 rows"):
        CSVLogger(tmp_path, "ledger.csv").load_state_dict(state)
    write(tmp_path, [{"other": 1}] * 4)
    with pytest.raises(UserError, match="another run"):
        CSVLogger(tmp_path).load_state_dict(state)


def spreadsheet(text: str) -> bytes:
    return b"\xef\xbb\xbf" + text.replace(",", ";").replace("\n", "\r\n").encode("utf-8")


@pytest.mark.parametrize(
    "touch",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("a,b\n1,2\n"),
        lambda path: path.write_text(path.read_text().replace("0.5", "0.9")),
        lambda path: path.write_bytes(spreadsheet(path.read_text())),
        lambda path: path.write_bytes(b"\xff\xfe\x00 no csv \x00"),
    ],
)
def test_a_file_that_someone_touched_is_put_back_and_theirs_kept(tmp_path: Path, touch):
    path = tmp_path / "metrics.csv"
    state = write(tmp_path).state_dict()
    whole = path.read_bytes()
    touch(path)
    theirs = path.read_bytes() if path.exists() else None
    CSVLogger(tmp_path).load_state_dict(state)
    assert path.read_bytes() == whole
    kept = [p.read_bytes() for p in tmp_path.glob("metrics.edited-*.csv")]
    assert kept == ([] if theirs is None else [theirs])


def test_a_file_saved_over_while_the_run_writes_loses_no_row(tmp_path: Path):
    logger = write(tmp_path, ROWS[:2])
    (tmp_path / "theirs").write_text("rollout_step\n0\n")
    (tmp_path / "theirs").rename(tmp_path / "metrics.csv")
    logger.log_metrics({"rollout_step": 2, "reward": 1 / 3})
    logger.flush()
    assert (tmp_path / "metrics.csv").read_text().splitlines()[-1] == "2,,0.3333333333333333,"
    assert (tmp_path / "metrics.edited-1.csv").read_text() == "rollout_step\n0\n"


def test_a_fresh_start_replaces_an_old_file_only_with_its_first_row(tmp_path: Path):
    write(tmp_path)
    fresh = CSVLogger(tmp_path)
    assert "val/avg_at_8" in (tmp_path / "metrics.csv").read_text()
    fresh.log_metrics({"a": 1})
    assert (tmp_path / "metrics.csv").read_text() == "a\n1\n"


def test_rows_go_on_after_finalize(tmp_path: Path):
    logger = write(tmp_path, [{"a": 1}])
    logger.finalize("success")
    logger.log_metrics({"a": 2})
    assert (tmp_path / "metrics.csv").read_text() == "a\n1\n2\n"


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = write(tmp_path / "run")
    logger.load_state_dict({"rows": 4, "columns": ["a"]})
    assert not (tmp_path / "run").exists()


def test_equal_but_time_overlooks_times_and_names_every_other_difference(tmp_path: Path):
    write(tmp_path / "a")
    write(tmp_path / "b", [row | {"time/seconds": 9.0, "time/new": 1.0} for row in ROWS])
    write(tmp_path / "c", [*ROWS[:2], ROWS[2] | {"reward": 0.5, "extra": 1}])
    a, b, c = (tmp_path / name / "metrics.csv" for name in "abc")
    assert equal_but_time(a, b) == []
    assert equal_but_time(a, c) == [
        f"column new: only in {a}",
        f"column extra: only in {c}",
        "row 3, column reward: 0.3333333333333333 != 0.5",
        "rows: 4 != 3",
    ]


def loggers_of(choice: str, run_dir: Path) -> dict[str, object]:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        config = compose(f"logger/{choice}", overrides=[f"+run_dir={run_dir}"])
    return {name: instantiate(node) for name, node in config.get("logger", {}).items()}


def test_each_logger_config_builds_what_it_names_in_the_run_directory(tmp_path: Path):
    default = loggers_of("default", tmp_path)
    assert default.keys() == {"csv", "tensorboard"}
    assert isinstance(default["csv"], CSVLogger)
    assert default["csv"].path == tmp_path / "metrics.csv"
    assert isinstance(default["tensorboard"], TensorBoardLogger)
    assert Path(default["tensorboard"].log_dir) == tmp_path / "tensorboard"
    assert loggers_of("csv", tmp_path).keys() == {"csv"}
    assert loggers_of("none", tmp_path) == {}
