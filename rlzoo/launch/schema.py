"""Every setting against what takes it, before anything is built.

A key of conf/ is an argument of its `_target_`, spelled the same: so the annotations of that
class, followed through its bases where it passes `**shared` on, are the schema. What has no
`_target_` (the keys of train.yaml itself) is listed here; Lightning's Trainer, most of
whose arguments are not the user's to set, is in `rlzoo.launch.trainer_keys`.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os.path import expanduser
from typing import Annotated, Any, Literal, NamedTuple

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, Node, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rlzoo.errors import UserError, first_line
from rlzoo.launch.configuration import (
    RENAMED,
    all_keys,
    check_sizes,
    did_you_mean,
    near_matches,
    plain,
)
from rlzoo.launch.targets import is_kind, target_of
from rlzoo.report.ledger import Limits
from rlzoo.values import (
    AtLeast0,
    AtLeast1,
    NonNegative,
    PathText,
    Positive,
    Seed,
    ShareBelow1,
    Threads,
    is_path,
    misfit,
    refuses,
    shown,
)

TOP: dict[str, Any] = {  # the values of train.yaml itself, and those that model= sets beside it
    "run_dir": PathText,
    "seed": Seed,
    "num_threads": Threads | None,
    "ckpt_path": PathText | None,
    "resume": Literal["exact", "weights"],
    "init_from": PathText | None,
    "replay": PathText | None,
    "doctor": bool,
    "debug": bool,
    "val_every": AtLeast0 | Literal["auto"],
    "pipeline": Literal["none", "one_step"],
    "lr": NonNegative,
    "critic_lr": Positive,
}
# Groups: what is built from one node, and what holds nodes by name.
ONE = ("model", "data", "reward", "engine", "datamodule", "algo", "strategy", "trainer")
NAMED = {"sampler": ("allocator", "callback"), "callbacks": (), "logger": ()}
# Bounds of classes that have none in their annotations: other people's, and a user's own.
Betas = Annotated[Sequence[ShareBelow1], "betas"]
OUTSIDE: dict[str, dict[str, Any]] = {
    "algo.optimizer": {
        "lr": NonNegative,
        "weight_decay": NonNegative,
        "eps": NonNegative,
        "momentum": NonNegative,
        "betas": Betas,
    },
    "algo.scheduler": {"num_warmup_steps": AtLeast0, "num_training_steps": AtLeast1},
    "model": {"path": PathText},
}
HYDRA = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([a-zA-Z_][\w.]*)(?:,[^${}]*)?\}")
SHOWN = 6  # problems in one message


class Value(NamedTuple):
    """A value of the configuration as it stands there."""

    key: str  # where it was set: at the end of a chain of ${...}
    value: Any  # plain, resolved
    own: bool  # whether it stands at the place that was asked for


class Signature(NamedTuple):
    """What a `_target_` takes."""

    arguments: dict[str, Any]  # annotation by name; Any where there is none
    open: bool  # whether other names may be taken too


def check_settings(cfg: DictConfig) -> None:
    """Compares every value with what takes it, and makes paths of `~` in place.

    Raises:
        UserError: values that are none, keys that nothing takes, or keys that are missing; one
            message for all of them.
    """
    fill_in(cfg)
    check_sizes(cfg)
    problems: dict[str, str] = {}  # by key, so that one that many read is named once
    later: dict[str, str] = {}
    for key, annotation in expected(cfg, problems):
        found = value_at(cfg, key, problems)
        if found is None or (is_node(found.value) and not (found.own and refuses(annotation))):
            continue
        problem = misfit(annotation, found.value)
        if problem is None and holds_nan(found.value):
            problem = f"is {found.value}, which is no value."
        if problem is not None:
            if found.own:
                problems.setdefault(key, problem)
            else:
                later.setdefault(found.key, f"{problem.rstrip('.')}: {key} reads it.")
        elif isinstance(found.value, str) and found.value.startswith("~") and is_path(annotation):
            OmegaConf.update(cfg, found.key, expanduser(found.value))
    names = set(all_keys(cfg)) & RENAMED.keys()
    names -= {key for key in problems if key.startswith("trainer.")}  # of Lightning's, told above
    problems = {**later, **problems, **{key: f"{RENAMED[key]}." for key in names}}
    if not problems:
        problems = trial(cfg)
    if problems:
        told = [f"{key}{'' if p[0] == '=' else ' '}{p}" for key, p in problems.items()]
        more = [f"... and {len(told) - SHOWN} more."] if len(told) > SHOWN else []
        raise UserError("\n".join(told[:SHOWN] + more))


def fill_in(cfg: DictConfig) -> None:
    """Gives what may be left out whole, `limits` and `logger`, the form that it has otherwise."""
    with open_dict(cfg):
        for key in ("limits", "logger", "callbacks"):
            if cfg.get(key) is None:
                cfg[key] = {}


def expected(cfg: DictConfig, problems: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """(key, annotation) of every value that is there; notes keys that are not, or must not be."""
    read = set(re.findall(r"\$\{([\w]+)", str(plain(cfg, resolve=False))))
    known = [*TOP, "limits", *ONE, *NAMED]
    for key in map(str, cfg):
        if key not in known and key not in read:  # a key of one's own is there to be ${read}
            problems[key] = f"is no setting that anything reads.{like(key, known)}"
    for key in known:
        if key not in cfg:
            if key not in ("lr", "critic_lr"):  # for what reads them as ${lr}
                problems[key] = "is missing: it was deleted."
        elif key in TOP:
            yield key, TOP[key]
    yield from of_mapping(cfg, "limits", signature_of(Limits).arguments, problems)
    for key in ONE:
        if key in cfg:
            yield from of_node(cfg, key, problems)
    for group, names in NAMED.items():
        node = cfg.get(group)
        if not isinstance(node, DictConfig):
            problems[group] = f"must be a mapping of names, got {node!r}."
            continue
        for name in map(str, node):
            key = f"{group}.{name}"
            if names and name not in names:
                problems[key] = f"is no part of a {group}.{like(name, names, group)}"
            elif names or value_at(cfg, key, problems, absent=None) is not None:
                yield from of_node(cfg, key, problems)


def of_mapping(
    cfg: DictConfig, group: str, known: Mapping[str, Any], problems: dict[str, str]
) -> Iterator[tuple[str, Any]]:
    if not isinstance(cfg.get(group), DictConfig):
        problems[group] = f"must be null or a mapping of {', '.join(known)}; got {cfg[group]!r}."
        return
    for name in cfg[group]:
        if name in known:
            yield f"{group}.{name}", known[name]
        else:
            problems[f"{group}.{name}"] = f"is no setting.{like(name, known, group)}"


def of_node(cfg: DictConfig, key: str, problems: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """(key, annotation) of the arguments of a node with a `_target_`, and of nodes in it."""
    found = value_at(cfg, key, problems)
    if found is None or not found.own:  # ${model}: looked at where it stands
        return
    node = found.value
    if not is_node(node):
        problems[key] = f"must be a mapping with a _target_, got {shown(node)}."
        return
    path = node["_target_"]
    try:
        target = target_of(node)
    except UserError as error:
        problems[f"{key}._target_"] = f"={error}"
        return
    signature = signature_of(target)
    if key == "trainer":
        from lightning import Trainer

        from rlzoo.launch.trainer_keys import ARGUMENTS, deleted

        if not is_kind(target, Trainer):
            problems[f"{key}._target_"] = (
                f"={path} is no trainer of Lightning's: lightning.Trainer."
            )
            return
        problems |= {f"{key}.{name}": "is missing: it was deleted." for name in deleted(node)}
        signature = Signature(signature.arguments | ARGUMENTS, signature.open)
    problems |= misplaced(cfg, key, node, target)
    for name in node:
        if name in HYDRA:
            continue
        if name not in signature.arguments and not signature.open:
            problems[f"{key}.{name}"] = (
                f"is nothing that {path.rpartition('.')[2]} takes."
                f"{like(name, signature.arguments, key) or f' Leave it out: ~{key}.{name}.'}"
            )
            continue
        yield f"{key}.{name}", signature.arguments.get(name, Any)
        if (bounded := OUTSIDE.get(key, {}).get(name)) is not None:
            yield f"{key}.{name}", bounded
        if isinstance(node._get_node(name), DictConfig) and is_node(node[name]):
            yield from of_node(cfg, f"{key}.{name}", problems)


def misplaced(
    cfg: DictConfig, key: str, node: DictConfig, target: Callable[..., Any]
) -> dict[str, str]:
    """What a node says of when it is built, or of where files go, that the run cannot keep."""
    problems = {}
    if key in ONE or key.rpartition(".")[0] in NAMED:  # what stands in such a node may come later
        if key != "model" and node.get("_partial_"):
            problems[f"{key}._partial_"] = f"must be left out: {key} is built when the run starts."
        if node.get("_recursive_") is False:
            problems[f"{key}._recursive_"] = "must be left out: what stands in a node is built too."
    if key == "model" and not node.get("_partial_"):
        problems["model._partial_"] = "must be true: the policy is built where it can be sharded."
    bases = getattr(target, "__mro__", (target,))
    ours = [base for base in bases if base.__module__.startswith("rlzoo.")]
    writes = "run_dir" in node and any("run_dir" in signature_of(base).arguments for base in ours)
    if writes and OmegaConf.select(cfg, f"{key}.run_dir") != cfg.get("run_dir"):
        problems[f"{key}.run_dir"] = (
            "must follow run_dir, where resumes, plots and the summary look for it. Set run_dir."
        )
    return problems


def value_at(
    cfg: DictConfig, key: str, problems: dict[str, str], absent: object = ...
) -> Value | None:
    """A value, and where it was set; None, which is noted, where it cannot be had.

    Args:
        absent: a value that counts as none.
    """
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, parent_key) if parent_key else cfg
    raw, own = node_at(parent, name), True
    try:
        if OmegaConf.is_missing(parent, name):
            problems[key] = f"must be given: {key}=VALUE."
            return None
        value = parent[name]
        while raw._is_interpolation():
            plain = REFERENCE.fullmatch(str(raw._value()))
            if plain is None:
                break
            group, _, name = plain[1].rpartition(".")
            origin = OmegaConf.select(cfg, group) if group else cfg
            if not isinstance(origin, DictConfig) or name not in origin.keys():
                break  # oc.select's fallback
            key, own, raw = plain[1], False, node_at(origin, name)
        if isinstance(value, DictConfig | ListConfig) and not is_node(value):
            value = OmegaConf.to_container(value, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        reason = f"cannot be resolved: {first_line(error)}"
        missing = "Missing mandatory value" in reason  # said of the key itself
        if not missing and not any(reason in problem for problem in problems.values()):
            problems[key] = f"={raw._value()} {reason}"
        return None
    return None if value is absent else Value(key, value, own)


def node_at(parent: DictConfig, name: str) -> Node:
    """What stands at a name that is there, a ${...} as it is written."""
    found = parent._get_node(name)
    assert isinstance(found, Node)
    return found


def signature_of(target: Callable[..., Any]) -> Signature:
    """The arguments of a class or function, those that it passes on as `**shared` included, but for
    those that the class says it has no place for."""
    if not inspect.isclass(target):
        return arguments_of(target)
    left_out: Sequence[str] = getattr(target, "left_out", tuple)()
    found, is_open = arguments_of_class(target)
    return Signature({n: kind for n, kind in found.items() if n not in left_out}, is_open)


def arguments_of_class(target: type) -> Signature:
    found: dict[str, Any] = {}
    outside = False  # who knows what a class that is not ours does with its **kwargs
    for base in target.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        own = arguments_of(vars(base)["__init__"])
        here = {name: kind for name, kind in own.arguments.items() if name != "self"}
        # What a subclass passes on without an annotation has its base's.
        said = {name: k for name, k in found.items() if k is not Any or name not in here}
        found = here | said
        if not own.open:
            return Signature(found, outside)
        outside = outside or not base.__module__.startswith("rlzoo.")
    return Signature(found, outside or (bool(found) and "__init__" not in vars(target)))


def arguments_of(function: Callable[..., Any]) -> Signature:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in: it does not say
        return Signature({}, True)
    own = inspect.unwrap(function)
    scope = vars(sys.modules.get(getattr(own, "__module__", ""), typing))
    taken = {
        name: annotation(parameter.annotation, scope)
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return Signature(taken, anything)


def annotation(written: Any, scope: Mapping[str, Any]) -> Any:
    """What an annotation stands for; Any for none, or for a name that is not there at run time."""
    if written is inspect.Parameter.empty:
        return Any
    if not isinstance(written, str):
        return written
    try:
        return eval(written, dict(scope))
    except Exception:  # imported for type checkers alone
        return Any


# --- a trial of what is built late ---------------------------------------------------------------


def trial(cfg: DictConfig) -> dict[str, str]:
    """Builds optimizer and schedule for one number: what they refuse they would refuse only when
    the engine has started."""
    import torch

    made: Any = [{"name": "policy", "params": [torch.nn.Parameter(torch.zeros(1))]}]
    for name in ("optimizer", "scheduler"):
        node, key = cfg.algo.get(name), f"algo.{name}"
        if node is None:
            break
        try:
            with warnings.catch_warnings(action="ignore"):
                made = instantiate(node)(made)
        except (InstantiationException, TypeError, ValueError) as error:
            if not node.get("_partial_"):
                return {key: "needs _partial_: true; it is built when the parameters exist."}
            reason = first_line(error.__cause__ or error)
            return {key: f"cannot be built with {settings(node)}: {reason}"}
    return {}


def settings(node: DictConfig) -> str:
    told = {str(name): value for name, value in node.items() if name not in HYDRA[1:]}
    return ", ".join(f"{name}={value}" for name, value in told.items())


# --- words ---------------------------------------------------------------------------------------


def is_node(value: object) -> bool:
    """Whether something is built from this value, or from one in it."""
    if isinstance(value, list):
        return any(map(is_node, value))
    return isinstance(value, Mapping) and "_target_" in value


def holds_nan(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(holds_nan, value.values()))
    if isinstance(value, list):
        return any(map(holds_nan, value))
    return isinstance(value, float) and math.isnan(value)


def like(name: str, known: Iterable[str], group: str = "") -> str:
    prefix = f"{group}." if group else ""
    return did_you_mean(f"{prefix}{found}" for found in near_matches(name, known))
