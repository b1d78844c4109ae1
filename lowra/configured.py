"""What configurations name: made, or one sentence that says why it cannot be."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from lowra.errors import LowraError, unknown
from lowra.methods import Method, as_method
from lowra.paths import conf_dir


def make(node: DictConfig, kind: str, name: str) -> Any:
    """Instantiate what a config names; a wrong `_target_` or parameter is one sentence."""
    if "_target_" not in node:
        raise LowraError(f"The config of {kind} {name!r} has no _target_; name a class or function to import.")
    try:
        return instantiate(node, _convert_="object")
    except LowraError:
        raise
    except Exception as error:  # hydra wraps whatever went wrong; its cause says it best
        cause = error.__cause__ or error
        if isinstance(cause, LowraError):
            raise cause from None
        text = " ".join(str(cause).split())
        raise LowraError(f"Cannot make {kind} {name!r} from {node['_target_']}: {text}") from error


def make_method(node: DictConfig, name: str) -> Method:
    """What a config makes, as a method; raises LowraError for what is none, and for code that changes what torch does.

    Merges, true weights and every other method would be of another precision.
    """
    try:
        with default_dtype_kept():
            return as_method(make(node, "method", name), name)
    except ChangedDefault as error:
        raise LowraError(f"Method {name!r}: when {node['_target_']} is imported, {error}.") from None


class ChangedDefault(Exception):
    """Somebody's code changed what new tensors are in this process."""


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Raise ChangedDefault where what runs inside leaves torch another default dtype, which is set back."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        after = torch.get_default_dtype()
        torch.set_default_dtype(before)
    if after != before:
        raise ChangedDefault(f"it set torch's default dtype to {after}, which is everybody's; give dtypes by name")


def whole_node(cfg: DictConfig, name: str, node: DictConfig, seen: tuple[str, ...] = ()) -> DictConfig:
    """A method's config, what it inherits from the one it is `like` filled in. seen: those that are like it."""
    if "like" not in node:
        return node
    if not isinstance(node.like, str):
        raise LowraError(f"methods.{name}.like is {node.like!r}; expected the name of a method.")
    if name in seen:
        raise LowraError(f"Methods {', '.join(map(repr, seen))} are like each other in a circle; give one a _target_.")
    base = None if node.like == name else cfg.methods.get(node.like)
    base = base or _shipped_node(cfg, str(node.like))
    if base is None:
        raise unknown("method", node.like, [p.stem for p in (conf_dir() / "methods").glob("*.yaml")])
    base = whole_node(cfg, str(node.like), base, seen if node.like == name else (*seen, name))
    own, inherited = _plain(node), _plain(base)
    del own["like"]
    if strange := sorted(set(own) - set(inherited)):
        raise unknown(f"option of method {node.like!r}", strange[0], [k for k in inherited if k != "_target_"])
    return OmegaConf.create({**inherited, **own})


def _shipped_node(cfg: DictConfig, name: str) -> DictConfig | None:
    path = conf_dir() / "methods" / f"{name}.yaml"
    if not path.is_file():
        return None
    return OmegaConf.create(_loaded(path), parent=cfg)  # what it refers to is in there


def _loaded(path: Path) -> dict[str, Any]:
    """A config file as it stands there."""
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    return _plain(node, resolve=False)


def _plain(node: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """A config node as a dictionary."""
    values = OmegaConf.to_container(node, resolve=resolve)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def options(node: DictConfig) -> dict[str, Any]:
    """What a method's or metric's config says beside its target."""
    return {key: value for key, value in _plain(node).items() if not key.startswith("_")}


def usual_options(cfg: DictConfig, target: str) -> dict[str, Any]:
    """The options that a target has where nobody says otherwise: those of its shipped config, or else its own."""
    name = _shipped_targets(conf_dir() / "methods").get(target)
    node = _shipped_node(cfg, name) if name else None
    return _own_defaults(target) if node is None else options(node)


def _own_defaults(target: str) -> dict[str, Any]:
    """The defaults in the signature of a class or a function."""
    try:
        parameters = inspect.signature(get_object(target)).parameters
    except (ValueError, TypeError):
        return {}
    return {name: each.default for name, each in parameters.items() if each.default is not each.empty}


@functools.cache
def _shipped_targets(folder: Path) -> dict[str, str]:
    """The names of the shipped configs by what they make; of two that make the same the first."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.yaml")):
        found.setdefault(str(_loaded(path).get("_target_")), path.stem)
    return found
