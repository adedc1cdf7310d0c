"""Overrides that do not fit the configuration are met with the name that was meant."""

from pathlib import Path

import pytest

import rlzoo.launch.configuration
from rlzoo.errors import UserError
from rlzoo.launch.configuration import check_overrides, conf_dir, near_matches, quoted_homes

FILES = {
    "train.yaml": "defaults: [{algo: grpo}, {sampler: gvm}, {experiment: null}, _self_]\nseed: 0\n",
    "algo/grpo.yaml": "clip_low: 0.2\noptimizer: {lr: 1.0e-6}\npolicy: ${model}\n",
    "algo/raft.yaml": "optimizer: {lr: 1.0e-6}\n",
    "sampler/gvm.yaml": "pilots: 8\n",
    "sampler/broken.yaml": "pilots: [8\nbeta: {",
    "experiment/fast.yaml": "# @package _global_\nseed: 7\n",
}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "conf"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algo=raft", "algo.optimizer.lr=0.1", "seed=3"],
        ["experiment=fast", "+algo.new=1", "~algo.clip_low"],
        ["hydra.run.dir=elsewhere"],
    ],
)
def test_overrides_that_fit_pass(conf: Path, overrides: list[str]) -> None:
    check_overrides(overrides, config_dir=conf)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["algo=grpoo"], ["algo=grpoo", "'algo'", "Did you mean algo=grpo?", "grpo, raft"]),
        (["experiment=fsat", "seed=1"], ["experiment=fsat", "Did you mean experiment=fast?"]),
        (["seed=1", "smapler=gvm"], ["'smapler'", "Did you mean sampler=gvm?", "+smapler=gvm"]),
        (["algo.clip_lo=0.1"], ["'algo.clip_lo'", "Did you mean algo.clip_low=0.1?"]),
        (["lr=0.1"], ["'lr'", "Did you mean algo.optimizer.lr=0.1?"]),
        (["~algo.clip_loww"], ["'algo.clip_loww'", "Did you mean algo.clip_low?"]),
        (["algo=raft", "algo.clip_low=0.1"], ["'algo.clip_low'", "+algo.clip_low=0.1"]),
        (["sed=1", "algo.clip_lo=0.1"], ["'sed'", "Did you mean seed=1?"]),
        (["seed = [1"], ["'seed = [1'", "Write key=value"]),
        (["algo=grpo,raft"], ["'algo=grpo,raft'", "names several values", "--multirun"]),
        (["algo=3"], ["algo=3", "must be a string"]),
        (["+seed=1"], ["+seed=1", "'++seed=1'"]),
        (["sampler=broken"], ["not valid YAML", "broken.yaml"]),
        (["algo=null"], ["algo=null", "the name of one of its files", "~algo"]),
        (["+name=a#b"], ["'+name=a#b'", "Write key=value"]),
        (["+run_dir="], ["run_dir must be text, not empty, got ''"]),
        (["+run_dir=5"], ["run_dir must be text, not empty, got 5"]),
    ],
)
def test_an_override_that_does_not_fit_is_named_with_its_mend(
    conf: Path, overrides: list[str], wanted: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        check_overrides(overrides, config_dir=conf)
    message = str(raised.value)
    assert [part for part in wanted if part not in message] == [], message


def test_only_the_chosen_options_keys_are_offered(conf: Path) -> None:
    with pytest.raises(UserError) as raised:
        check_overrides(["algo=raft", "algo.clip_lo=0.1"], config_dir=conf)
    assert "Did you mean" not in str(raised.value)


def test_a_broken_default_of_the_configuration_itself_is_named(conf: Path) -> None:
    (conf / "train.yaml").write_text("defaults: [{algo: ppo}, _self_]\nseed: 0\n")
    with pytest.raises(UserError, match="In 'train': Could not find 'algo/ppo'"):
        check_overrides(["sede=1"], config_dir=conf)


def test_a_command_line_with_flags_is_left_to_hydra(conf: Path) -> None:
    check_overrides(["--multirun", "algo=grpo,raft", "unknown=1"], config_dir=conf)


def test_a_path_of_the_home_folder_is_quoted_for_hydra(conf: Path) -> None:
    given = [
        "run_dir=~/x",
        "a=[~/b,c]",
        "a=~me/b,~/c",
        "~limits",
        "a='~/b'",
        "--config-dir=~/c",
        "a=b~c",
    ]
    quoted = ["run_dir='~/x'", "a=['~/b',c]", "a='~me/b','~/c'", "~limits", "a='~/b'"]
    assert quoted_homes(given) == [*quoted, "--config-dir=~/c", "a=b~c"]
    check_overrides(["+run_dir=~/x"], config_dir=conf)


def test_near_matches_come_best_first_and_never_repeat_the_name() -> None:
    known = ["seed", "algo.clip_low", "algo.clip_high", "data.clip_low"]
    assert near_matches("algo.clip_low", known)[0] == "data.clip_low"
    assert near_matches("algo.cliplow", known, limit=1) == ["algo.clip_low"]
    assert near_matches("nothing_like_it", known) == []


def test_the_packages_own_conf_is_found_before_one_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "rlzoo"
    package.mkdir(parents=True)
    file = package / "launch" / "configuration.py"
    monkeypatch.setattr(rlzoo.launch.configuration, "__file__", str(file))
    with pytest.raises(UserError, match="installation of rlzoo is incomplete"):
        conf_dir()
    beside, inside = tmp_path / "site" / "conf", package / "conf"
    for place in (beside, inside):
        place.mkdir()
        assert conf_dir_or_none() != place  # an empty folder is no configuration
        (place / "train.yaml").write_text("seed: 0\n")
        assert conf_dir() == place


def conf_dir_or_none() -> Path | None:
    try:
        return conf_dir()
    except UserError:
        return None
