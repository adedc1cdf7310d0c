"""Weights & Biases and MLflow: one identity per run, each step once, and never in a run's way."""

import json
import logging
from pathlib import Path

import pytest

import rlzoo.report.trackers
from rlzoo.errors import UserError
from rlzoo.report.trackers import Tracker, flat
from tests import warm


class Recorded(Tracker):
    """A tracker whose library is Python's json, and whose server a list."""

    library, title = "json", None
    sent: list[tuple[str, int, dict[str, float]]] = []
    away = False

    def begin(self, identity):
        return self.sent, identity or "made-here"

    def send(self, run, row, step):
        if self.away:
            raise ConnectionError("no route")
        run.append((self.identity, step, row))


@pytest.fixture(autouse=True)
def nothing_sent(monkeypatch):
    monkeypatch.setattr(Recorded, "sent", [])


def test_a_resumed_run_keeps_its_identity_and_sends_no_step_twice(tmp_path: Path):
    first = Recorded(tmp_path)
    for step in range(3):
        first.log_metrics(
            {"reward": step / 2, "gone": None, "nan": float("nan"), "said": "x"}, step
        )
    resumed = Recorded(tmp_path)
    for step in range(2, 5):  # step 2 was measured twice
        resumed.log_metrics({"reward": step / 2}, step)
    assert Recorded.sent == [("made-here", step, {"reward": step / 2}) for step in range(5)]
    assert json.loads((tmp_path / "json.json").read_text()) == {"id": "made-here", "last_step": 4}


def test_a_server_that_is_away_is_told_once_and_ends_no_run(tmp_path: Path, caplog, monkeypatch):
    tracker = Recorded(tmp_path)
    tracker.log_metrics({"reward": 1.0}, 0)
    monkeypatch.setattr(Recorded, "away", True)
    with caplog.at_level(logging.WARNING):
        tracker.log_metrics({"reward": 1.0}, 1)
        tracker.log_metrics({"reward": 1.0}, 2)
    assert [record.message.count("no route") for record in caplog.records] == [1]
    monkeypatch.setattr(Recorded, "away", False)
    tracker.log_metrics({"reward": 1.0}, 3)
    assert [step for _, step, _ in Recorded.sent] == [0, 3]


def test_a_run_that_cannot_be_begun_is_refused_at_start(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Recorded, "begin", lambda self, identity: 1 / 0)
    with pytest.raises(UserError, match="logger=json could not begin its run .ZeroDivisionError"):
        _ = Recorded(tmp_path).experiment


def test_a_configuration_is_sent_key_by_key():
    assert flat({"a": 1, "b": {"c": None, "d": {"e": [1]}}}) == [
        ("a", 1),
        ("b.c", None),
        ("b.d.e", [1]),
    ]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path: Path, name, monkeypatch):
    monkeypatch.setattr(rlzoo.report.trackers, "find_spec", lambda name: None)
    message = warm.refused(tmp_path / "run", f"logger={name}")
    assert f"logger={name} needs {name}, which is not installed: install rlzoo[{name}]" in message
