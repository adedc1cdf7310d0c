"""A class of one's own is read as what it is made from; an older name is met with the new one."""

import logging
import pydoc
from pathlib import Path

import pytest

from rlzoo.algos import GRPO
from rlzoo.data.sft import SFTDataModule
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.engines.vllm import VLLMEngine
from rlzoo.errors import UserError
from rlzoo.launch.configuration import RENAMED, check_overrides
from rlzoo.launch.idle import check_idle
from rlzoo.launch.schema import check_settings
from rlzoo.launch.targets import MOVED, target_of
from rlzoo.launch.training import build
from rlzoo.report.loggers import CSVLogger
from rlzoo.report.progress import Bars
from tests.test_idle import SFT
from tests.test_values import compose


class OwnEngine(TransformersEngine):
    pass


class OwnVLLM(VLLMEngine):
    pass


class OwnData(SFTDataModule):
    pass


class OwnLogger(CSVLogger):
    pass


def test_settings_idle_under_a_class_are_idle_under_ones_own_of_it(caplog, monkeypatch):
    engine = "engine._target_=tests.test_targets.OwnEngine"
    tolerance = "callbacks.weight_sync.probe_tolerance=0.1"
    with pytest.raises(UserError, match="probe_tolerance=0.1 would do nothing: engine=transf"):
        check_idle(compose("engine=transformers", engine, tolerance), [tolerance])
    monkeypatch.setattr("rlzoo.launch.idle.why_not_vllm", lambda: None)
    rows = "engine.transformers.max_rows=8"
    with caplog.at_level(logging.WARNING):
        check_idle(compose("engine.vllm._target_=tests.test_targets.OwnVLLM", rows), [rows])
    assert f"{rows} does nothing: engine=auto takes vLLM here" in caplog.text


def test_ones_own_supervised_data_is_supervised():
    cfg = compose(*SFT, "datamodule._target_=tests.test_targets.OwnData")
    with pytest.raises(UserError, match="val_every=4 would do nothing: algo=sft"):
        check_idle(cfg, ["val_every=4"])


def test_ones_own_logger_has_to_write_where_the_run_looks():
    with pytest.raises(UserError, match=r"logger\.csv\.run_dir must follow run_dir"):
        check_settings(
            compose("logger.csv._target_=tests.test_targets.OwnLogger", "logger.csv.run_dir=a")
        )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "logger.csv._target_=rlzoo.loggers.CSVLogger",
            "rlzoo.loggers is now rlzoo.report.loggers",
        ),
        ("algo._target_=old_house.Mine", "rlzoo.losses is now rlzoo.learning.losses"),
    ],
)
def test_an_older_name_is_refused_with_the_new_one(override, words, tmp_path: Path, monkeypatch):
    (tmp_path / "old_house.py").write_text("from rlzoo.losses import nll_loss\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as raised:
        check_settings(compose(override))
    assert words in str(raised.value) and " cannot be imported: " in str(raised.value)


def test_what_has_moved_is_where_it_is_said_to_be_and_no_longer_where_it_was():
    assert [new for new in MOVED.values() if pydoc.locate(new) is None] == []
    assert [old for old in MOVED if pydoc.locate(old) is not None] == []


def test_what_is_not_there_is_said():
    assert target_of({"_target_": "tests.test_targets.OwnEngine"}) is OwnEngine
    for path in ("tests.test_targets.Nobody", "nothing.there", 3):
        with pytest.raises(UserError, match=f"^{path} cannot be imported: there is no such class"):
            target_of({"_target_": path})


def test_a_renamed_key_is_refused_with_the_new_one(monkeypatch):
    monkeypatch.setitem(RENAMED, "algo.clip_width", "is now algo.clip_low")
    monkeypatch.setitem(RENAMED, "callbacks.saver", "is now callbacks.checkpoint")
    with pytest.raises(UserError, match="algo.clip_width is now algo.clip_low"):
        check_overrides(["algo.clip_width=0.1"])
    with pytest.raises(UserError, match="callbacks.training_phase is the loop's own now"):
        check_overrides(["callbacks.training_phase=null"])
    with pytest.raises(UserError) as raised:  # as in a file of one's own
        check_settings(compose("+algo.clip_width=0.1", "+callbacks.saver=null"))
    for old in ("algo.clip_width", "callbacks.saver"):
        assert f"{old} {RENAMED[old]}." in str(raised.value)


class Passing(GRPO):
    """Passes an argument on that it gives a default of its own, without an annotation."""

    def __init__(self, policy, optimizer, *, group_size=4, **shared):
        super().__init__(policy, optimizer, group_size=group_size, **shared)


def test_an_argument_that_is_passed_on_without_annotation_has_the_bounds_of_its_base():
    with pytest.raises(UserError, match="algo.group_size must be a whole number, at least 2"):
        check_settings(compose("algo._target_=tests.test_targets.Passing", "algo.group_size=1"))
    check_settings(compose("algo._target_=tests.test_targets.Passing", "algo.group_size=2"))


@pytest.mark.parametrize(
    "more, words",
    [
        (
            ["+callbacks.saver={_target_: rlzoo.callbacks.Checkpoint, run_dir: '${run_dir}'}"],
            "callbacks.saver would do nothing: .* under the name callbacks.checkpoint alone",
        ),
        (["+callbacks.sft_log._target_=rlzoo.callbacks.SFTLog"], "callbacks.sft_log would do noth"),
    ],
)
def test_a_part_that_the_loop_would_not_call_is_refused(more, words):
    with pytest.raises(UserError, match=words):
        build(compose(*more), Bars(enabled=False))
