"""Who may ask a replica for what, who sends it a key, and who can read weights on their way."""

import asyncio
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rlzoo.engines.guard import RequireKey
from rlzoo.engines.private_folder import PREFIX, PrivateFolder
from rlzoo.engines.vllm_server import VLLMServerEngine, serve_command
from rlzoo.engines.weight_transfer import FanOut
from rlzoo.errors import UserError
from rlzoo.launch.configuration import conf_dir
from rlzoo.models.loading import TINY
from rlzoo.models.policy import load_policy
from tests.engines.test_weight_transfer import LENGTHS, recorder, replica

KEY = "a key that nobody guesses"


def make(addresses: list[str], folder: Path, **options: object) -> VLLMServerEngine:
    return VLLMServerEngine(
        str(TINY), [0], addresses=addresses, folder=str(folder), **LENGTHS | options
    )


# --- the server's side ----------------------------------------------------------------------------


def status(path: str, client: str | None, authorization: str | None) -> int:
    """What a guarded server answers: 200 from the application, 401 from the guard."""
    told = []

    async def app(scope: dict, receive: object, send: object) -> None:
        told.append(200)

    async def send(message: dict) -> None:
        told.append(message.get("status"))

    headers = [(b"authorization", authorization.encode())] if authorization else []
    scope = {"type": "http", "path": path, "headers": headers}
    scope["client"] = (client, 4711) if client else None
    asyncio.run(RequireKey(app)(scope, None, send))
    return told[0]


@pytest.mark.parametrize(
    "path", ["/collective_rpc", "/update_weights", "/inference/v1/generate", "/"]
)
def test_a_key_guards_every_path(path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert status(path, "10.0.0.9", f"Bearer {KEY}") == 200
    for wrong in (None, f"Bearer {KEY}x", KEY, "Bearer "):
        assert status(path, "127.0.0.1", wrong) == 401
    assert status("/health", "10.0.0.9", None) == 200


@pytest.mark.parametrize("variable", [None, ""])
def test_without_a_key_this_machine_alone_is_answered(variable, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    for client, expected in {"127.0.0.1": 200, "::1": 200, "10.0.0.9": 401, None: 200}.items():
        assert status("/collective_rpc", client, None) == expected


def test_replicas_are_started_for_this_machine_and_behind_the_guard():
    command = serve_command("tiny", 8000, 128)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--middleware") + 1] == "rlzoo.engines.guard.RequireKey"
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    assert "--host 127.0.0.1" in page and "--middleware rlzoo.engines.guard.RequireKey" in page


# --- the trainer's side ---------------------------------------------------------------------------


def answer(path: str, body: dict | None) -> tuple[int, object]:
    return 200, {"results": [{"version": 5}], "success": True}


@pytest.mark.vllm
def test_the_key_goes_with_every_request_and_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with recorder(answer) as server:
        engine = make([server.address], tmp_path, api_key_variable="MY_KEY")
        engine.load_weights(load_policy("tiny").named_parameters(), 5)
        FanOut([replica(server.address)], 30.0, KEY).start_weight_update()
        assert server.keys == 3 * [f"Bearer {KEY}"]
        engine.close()
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        make([server.address], tmp_path).load_weights(load_policy("tiny").named_parameters(), 5)
        assert server.keys[3:] == [None, None]
    assert "api_key:" not in (conf_dir() / "engine" / "vllm_server.yaml").read_text()


def test_a_key_in_the_place_of_its_variable_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(UserError, match="not the key itself") as error:
        make(["http://127.0.0.1:1"], tmp_path, api_key_variable="sk-123")
    assert "sk-123" not in str(error.value)


@pytest.mark.parametrize("key, words", [(None, "this run sends none"), (KEY, "another key")])
def test_a_server_that_asks_for_a_key_is_told_apart_from_one_that_is_gone(
    key, words, tmp_path, monkeypatch
):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("VLLM_API_KEY", key)
    with recorder(lambda path, body: (401, {"error": "Unauthorized"})) as server:
        engine = make([server.address], tmp_path)
        with pytest.raises(RuntimeError, match=f"{words}.*engine.api_key_variable"):
            engine.load_weights(load_policy("tiny").named_parameters(), 5)


def test_a_replica_that_would_obey_anyone_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    guarded = recorder(lambda path, body: (401, {"error": "Unauthorized"}))
    with recorder(answer) as opened, guarded as closed:
        engine = make([opened.address, closed.address], tmp_path)
        engine.replicas.alive = [opened.address, closed.address]
        engine._tell_of_open_ones()
        assert opened.keys == closed.keys == [None]
    assert f"{opened.address} does what it is asked without a key" in caplog.text
    assert closed.address not in caplog.text
    monkeypatch.delenv("VLLM_API_KEY")
    engine = make([opened.address], tmp_path)  # on loopback, without a key: nobody is asked
    engine.replicas.alive = [opened.address]
    engine._tell_of_open_ones()


def test_all_replicas_are_asked_at_once(tmp_path):
    import threading

    together = threading.Barrier(3)

    def wait(path: str, body: dict | None) -> tuple[int, object]:
        together.wait(timeout=20)
        return answer(path, body)

    with recorder(wait) as one, recorder(wait) as two, recorder(wait) as three:
        engine = make([s.address for s in (one, two, three)], tmp_path)
        engine.load_weights(load_policy("tiny").named_parameters(), 5)
        assert engine.version == 5 and len(engine.replicas.alive) == 3


# --- weights on their way -------------------------------------------------------------------------


def test_weights_travel_in_a_file_that_no_other_user_can_read_guess_or_plant(tmp_path):
    seen = []

    def look(path: str, body: dict | None) -> tuple[int, object]:
        if body:
            file = Path(body["args"][0])
            modes = [stat.S_IMODE(p.stat().st_mode) for p in (file.parent, file)]
            seen.append((file, modes))
        return answer(path, body)

    umask = os.umask(0)
    try:
        with recorder(look) as server:
            for _ in range(2):
                engine = make([server.address], tmp_path)
                engine.load_weights(load_policy("tiny").named_parameters(), 5)
                assert not seen[-1][0].exists()  # gone as soon as all have read it
                engine.close()
    finally:
        os.umask(umask)
    (one, modes), (two, again) = seen
    assert modes[0] == again[0] == 0o700 and one.parent != two.parent
    assert modes[1] & 0o077 == 0
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from pathlib import Path
from rlzoo.engines.private_folder import PrivateFolder
folder = PrivateFolder(Path(sys.argv[1]))
(folder.path / "5.safetensors").write_text("weights")
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(PREFIX)
    other = tmp_path / f"{PREFIX}anothers"  # not made by us: no lock
    other.mkdir()
    living = PrivateFolder(tmp_path)
    second = PrivateFolder(tmp_path)
    assert set(tmp_path.iterdir()) == {living.path, second.path, other}
    living.close()
    living.close()
    second.close()
    assert list(tmp_path.iterdir()) == [other]
