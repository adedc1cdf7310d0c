"""Loggers of other people's: Weights & Biases and MLflow, beside metrics.csv, never instead of it.

A run keeps one identity there however often it is resumed, in `run_dir/NAME.json`, and no step is
sent twice: what a resumed run does once more is not told again. (What stays there is then what the
stopped run had measured; metrics.csv is cut back and always right.)
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from rlzoo.errors import UserError
from rlzoo.report.loggers import RunLogger
from rlzoo.values import PathText, Text

log = logging.getLogger(__name__)


class Tracker(RunLogger):
    """What both have in common: an identity that outlives a process, each step once.

    Args:
        run_dir: of the run; the identity is kept in it.
        title: of the run; null is the last part of run_dir.

    Raises:
        UserError: the library is not installed; from `experiment`, which Lightning asks for before
            anything is drawn, no run could be begun there.
    """

    library: str  # what is imported, and the extra of rlzoo's that installs it

    def __init__(self, run_dir: PathText | Path, title: Text | None = None) -> None:
        super().__init__(run_dir)
        if find_spec(self.library) is None:
            raise UserError(
                f"logger={self.library} needs {self.library}, which is not installed: install"
                f" rlzoo[{self.library}], or take logger=default, which writes metrics.csv and"
                " TensorBoard's files."
            )
        self.run_name = title or self.run_dir.resolve().name
        self.note = self.run_dir / f"{self.library}.json"
        self._run: Any = None
        self._failed = False  # whether it was said that rows are lost

    def begin(self, identity: str | None) -> tuple[Any, str]:
        """Begins a run there, or goes on with the one of that identity: what rows are sent through,
        and its identity."""
        raise NotImplementedError

    def send(self, run: Any, row: dict[str, float], step: int) -> None:
        raise NotImplementedError

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._run is None:
            told = json.loads(self.note.read_text()) if self.note.exists() else {}
            self.last_step = told.get("last_step", -1)
            try:
                self._run, self.identity = self.begin(told.get("id"))
            except Exception as error:  # each library has kinds of its own
                raise UserError(
                    f"logger={self.library} could not begin its run ({type(error).__name__}:"
                    f" {error}). Mend that, or take logger=default."
                ) from error
            self.remember()
        return self._run

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        run, step = self.experiment, step or 0
        if step <= self.last_step:
            return
        row = {name: float(value) for name, value in metrics.items() if is_number(value)}
        try:
            self.send(run, row, step)
        except Exception as error:  # a server that is away must not end a run
            if not self._failed:
                log.warning(
                    f"logger={self.library} takes no rows ({type(error).__name__}: {error}); the"
                    " run goes on, and metrics.csv has them all."
                )
            self._failed = True
            return
        self.last_step = step
        self.remember()

    def remember(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        partial = self.note.with_name(self.note.name + ".tmp")
        partial.write_text(json.dumps({"id": self.identity, "last_step": self.last_step}) + "\n")
        os.replace(partial, self.note)

    def settings(self) -> dict[str, Any]:
        """The run's configuration as config.yaml has it; empty before it is written."""
        path = self.run_dir / "config.yaml"
        return yaml.safe_load(path.read_text()) if path.exists() else {}

    @property
    def name(self) -> str:
        return self.library


class WandB(Tracker):
    """Weights & Biases.

    Args:
        run_dir: where its files go, in `wandb/`.
        project, entity: where the run is shown; null is the account's own entity.
        title: of the run; null is the last part of run_dir.
        mode: "offline" writes files that `wandb sync` sends later; "online" needs `wandb login`.
    """

    library = "wandb"

    def __init__(
        self,
        run_dir: PathText | Path,
        project: Text = "rlzoo",
        entity: Text | None = None,
        title: Text | None = None,
        mode: Literal["offline", "online"] = "offline",
    ) -> None:
        super().__init__(run_dir, title)
        self.project, self.entity, self.mode = project, entity, mode

    def begin(self, identity: str | None) -> tuple[Any, str]:
        import wandb

        identity = identity or uuid.uuid4().hex[:12]
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.run_name,
            id=identity,
            resume="allow",  # goes on with that identity, or begins it
            dir=str(self.run_dir),
            mode=self.mode,
            config=self.settings(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        return run, identity

    def send(self, run: Any, row: dict[str, float], step: int) -> None:
        run.log(row, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if status in ("success", "finished") else 1)
            self._run = None


class MLflow(Tracker):
    """MLflow.

    Args:
        run_dir: where its files go, in `mlruns/`, unless there is a server.
        tracking_uri: of a server, such as http://localhost:5000; null writes files.
        experiment_name: that the run is shown under.
        title: of the run; null is the last part of run_dir.
    """

    library = "mlflow"

    def __init__(
        self,
        run_dir: PathText | Path,
        tracking_uri: Text | None = None,
        experiment_name: Text = "rlzoo",
        title: Text | None = None,
    ) -> None:
        super().__init__(run_dir, title)
        self.tracking_uri, self.experiment_name = tracking_uri, experiment_name

    def begin(self, identity: str | None) -> tuple[Any, str]:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it asks for a database otherwise
        from mlflow import MlflowClient

        folder = (self.run_dir / "mlruns").resolve().as_uri()
        client = MlflowClient(self.tracking_uri or folder)
        if identity is None:
            known = client.get_experiment_by_name(self.experiment_name)
            experiment = (
                known.experiment_id if known else client.create_experiment(self.experiment_name)
            )
            identity = client.create_run(experiment, run_name=self.run_name).info.run_id
        else:
            client.update_run(identity, status="RUNNING")
        for key, value in flat(self.settings()):
            client.set_tag(identity, key, str(value)[:5000])
        return client, identity

    def send(self, run: Any, row: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        # Its files are named by metric: `responses` cannot be one, and the folder of another.
        metrics = [Metric(name.replace("/", "."), value, now, step) for name, value in row.items()]
        run.log_batch(self.identity, metrics=metrics)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            ended = "FINISHED" if status in ("success", "finished") else "FAILED"
            self._run.set_terminated(self.identity, ended)
            self._run = None


def is_number(value: Any) -> bool:
    """Whether a value can be drawn: no text, no null, no NaN."""
    try:
        return not isinstance(value, str) and math.isfinite(value)
    except TypeError:
        return False


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found += flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found
