"""Where the configuration lies, and what to say of overrides that do not fit it."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf

from rlzoo.errors import UserError, one_line
from rlzoo.launch.processes import register

register()

HOME = re.compile(r"(?<=[=,\[:])~[^\s,\[\]{}()=:]*")  # a path of the home folder in an override
# Dotted keys that were, and what has become of each: for command lines and files from then.
RENAMED = {
    "callbacks.training_phase": "is the loop's own now: leave it out",
    "algo.max_tokens_per_microbatch": "is algo.tokens_per_microbatch now, of real tokens",
    "sampler.callback.max_tokens": "is algo.tokens_per_microbatch now, the same for all passes",
    "trainer.accumulate_grad_batches": "has gone: algo.tokens_per_microbatch splits an update",
}
MIN_LIKENESS = 0.7  # of two names, by difflib's ratio, for one to be offered for the other


def conf_dir() -> Path:
    """The folder that holds train.yaml and the config groups.

    A wheel holds it as rlzoo/conf; a checkout and an editable install have it beside the
    package.

    Raises:
        UserError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    # The package's own first: a stranger's `conf` may lie beside an installed rlzoo.
    places = [package / "conf", package.parent / "conf"]
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    raise UserError(
        f"conf/train.yaml is neither in {places[0]} nor in {places[1]}: this installation of"
        " rlzoo is incomplete. Install it again, or restore conf/ from the repository."
    )


def near_matches(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` names out of `known` that `name` may have been meant for, best first.

    A dotted key is also found by its last part alone: `lr` finds `algo.optimizer.lr`.
    """

    def likeness(key: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name, key).ratio()
        last = difflib.SequenceMatcher(None, _last_part(name), _last_part(key)).ratio()
        return max(whole, last), whole

    scored = {key: likeness(key) for key in known if key != name}
    close = [key for key, score in scored.items() if score[0] >= MIN_LIKENESS]
    return sorted(close, key=lambda key: scored[key], reverse=True)[:limit]


def _last_part(key: str) -> str:
    return key.rpartition(".")[2]


def quoted_homes(overrides: Sequence[str]) -> list[str]:
    """The overrides with paths such as ~/runs/a in quotes, without which Hydra cannot read them.

    `rlzoo.launch.schema` puts the home folder in, where a setting takes a path.
    """
    return [
        override
        if override.startswith(("~", "-")) or {"'", '"'} & set(override)
        else HOME.sub(lambda path: f"'{path[0]}'", override)
        for override in overrides
    ]


def overrides_given() -> list[str]:
    """The overrides of the command line; none where Hydra did not start the run."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def check_overrides(
    overrides: Sequence[str], config_name: str = "train", config_dir: Path | None = None
) -> None:
    """Compose the configuration once, to say in one message what does not fit it.

    Args:
        overrides: Hydra overrides, as on the command line: `key=value`, `group=option`,
            `+new=value`, `~key`. Nothing is checked if one of them is a flag (`--multirun`,
            `--config-dir`, ...): flags change what is composed, so Hydra itself has the word.
        config_name: the primary config, without `.yaml`.
        config_dir: the folder it lies in; `conf_dir()` if None.

    Raises:
        UserError: an override is malformed, or names an unknown group option or key, or a
            config file is not valid YAML. The message names the nearest existing names.
    """
    if any(override.startswith("-") for override in overrides):
        return
    overrides = quoted_homes(overrides)
    directory = (config_dir or conf_dir()).resolve()
    with initialize_config_dir(version_base="1.3", config_dir=str(directory)):
        try:
            cfg = _compose(config_name, overrides)
        except OverrideParseException as error:
            raise UserError(_syntax_message(error.override)) from error
        except (HydraException, ValueError) as error:
            raise UserError(_misfit_message(error, config_name, overrides)) from error
        except yaml.YAMLError as error:
            raise UserError(f"A configuration file is not valid YAML: {error}") from error
    run_dir = plain(cfg, resolve=False).get("run_dir", "none")
    if not isinstance(run_dir, str) or not run_dir.strip():
        raise UserError(f"run_dir must be text, not empty, got {run_dir!r}: name a directory.")


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    return compose(config_name, overrides=list(overrides), return_hydra_config=True)


def _syntax_message(override: str) -> str:
    return (
        f"{override!r} is not an override that Hydra can read. Write key=value, without"
        " spaces around '='; a value that holds a space or one of ,=:(){}[] needs quotes for"
        " Hydra and for the shell: \"key='a, b'\"."
    )


def _misfit_message(
    error: HydraException | ValueError, config_name: str, overrides: Sequence[str]
) -> str:
    """The message for overrides that can be read but do not fit the configuration."""
    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException:  # a character that Hydra's grammar has no place for
            return _syntax_message(text)
    no_text = "must be a string" in str(error)
    for override in parsed:
        if no_text and override.value() is None and not override.is_delete():
            return (
                f"{override.input_line}: a config group takes the name of one of its files. To"
                f" leave the group out, write ~{override.key_or_group}."
            )
        if override.is_sweep_override():
            return (
                f"{override.input_line!r} names several values, which only a sweep can run: add"
                f' --multirun, or quote a list as "{override.key_or_group}=[a,b]".'
            )
    if isinstance(error, MissingConfigException):
        return _missing_option_message(error, parsed)
    culprits = [override for override in parsed if f"'{override.key_or_group}'" in str(error)]
    if isinstance(error, ConfigCompositionException) and culprits:
        if not (culprits[0].is_add() or culprits[0].is_force_add()):
            return _unknown_key_message(culprits[0], config_name, parsed)
    given = " ".join(overrides)
    return f"The configuration {config_name!r} cannot be composed from {given!r}: {one_line(error)}"


def _missing_option_message(error: MissingConfigException, parsed: Sequence[Override]) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    asked = [override for override in parsed if override.key_or_group == group]
    if not asked or not error.options:
        # A config file's own defaults list, or the primary config, names what is not there.
        return one_line(error)
    near = near_matches(option, error.options)
    return (
        f"{asked[0].input_line}: there is no {option!r} in the config group {group!r}."
        f"{did_you_mean(f'{group}={name}' for name in near)}"
        f" It has: {', '.join(sorted(error.options))}."
    )


def _unknown_key_message(culprit: Override, config_name: str, parsed: Sequence[Override]) -> str:
    key = culprit.key_or_group
    others = [str(override.input_line) for override in parsed if override is not culprit]
    keys = _known_keys(config_name, others)
    if not key.startswith("hydra"):
        keys = [name for name in keys if name.split(".")[0] != "hydra"]
    if key in RENAMED:
        return f"{culprit.input_line}: {key} {RENAMED[key]}."
    near, add = near_matches(key, keys), ""
    if not culprit.is_delete():
        near = [f"{name}={culprit.get_value_element_as_str()}" for name in near]
        add = f" To add a new key, write +{culprit.input_line}."
    return (
        f"{culprit.input_line}: there is no key or config group {key!r} in the configuration"
        f" {config_name!r}.{did_you_mean(near)}{add}"
    )


def _known_keys(config_name: str, overrides: Sequence[str]) -> list[str]:
    """Every dotted key there is under `overrides`; under none, if they do not compose either."""
    for attempt in (overrides, []):
        try:
            return list(all_keys(_compose(config_name, attempt)))
        except HydraException:
            continue
    return []


def did_you_mean(near: Iterable[str]) -> str:
    found = list(near)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def check_sizes(cfg: DictConfig) -> None:
    """Whether the file of conf/model brings all sizes that are read.

    Raises:
        UserError: it does not, as those of before `sizes` were.
    """
    read = set(re.findall(r"\$\{sizes\.(\w+)\}", str(plain(cfg, resolve=False))))
    lacking = sorted(read - set(map(str, cfg.get("sizes") or {})))
    if lacking:
        raise UserError(
            f"The file of conf/model that model= names brings no sizes.{', sizes.'.join(lacking)}:"
            " copy `sizes:` from conf/model/hf.yaml to it, with the line `# @package _global_`, or"
            " give them here as +sizes.NAME=VALUE."
        )


def all_keys(config: DictConfig) -> Iterator[str]:
    """Every dotted key of `config`, nodes included; interpolations are not followed."""

    def walk(node: object, prefix: str) -> Iterator[str]:
        if isinstance(node, dict):
            for name, child in node.items():
                yield f"{prefix}{name}"
                yield from walk(child, f"{prefix}{name}.")

    yield from walk(plain(config, resolve=False), "")


def plain(cfg: DictConfig, *, resolve: bool) -> dict[str, Any]:
    """A configuration as dicts and lists; interpolations are followed, or stay as text."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=resolve))


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping; an empty mapping is a value."""
    if not isinstance(node, Mapping) or not node:
        yield prefix, node
        return
    for name, child in node.items():
        yield from leaves(child, f"{prefix}.{name}" if prefix else str(name))
