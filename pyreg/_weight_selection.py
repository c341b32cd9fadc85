"""Which weights of a model :func:`pyreg.compand` takes, and which are companded already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from pyreg.nn import WeightCompander
from pyreg.ops import _library

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Exclude = str | nn.Module | type[nn.Module]


@dataclass(eq=False)
class Weight:
    """A parameter and where it is used: in one place or, if it is tied, in several."""

    param: nn.Parameter
    places: list[tuple[nn.Module, str]] = field(default_factory=list)  # module, attribute
    names: list[str] = field(default_factory=list)  # in the model; more than places where modules are shared
    excluded: bool = False

    def add(self, module: nn.Module, attribute: str, name: str) -> None:
        if not any(module is known and attribute == other for known, other in self.places):
            self.places.append((module, attribute))
        self.names.append(name)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def parametrization(self) -> parametrize.ParametrizationList:
        return parametrization_of(*self.places[0])


def weights_to_compand(model: nn.Module, exclude: Exclude | Iterable[Exclude], embeddings: bool) -> list[Weight]:
    modules = dict(model.named_modules(remove_duplicate=False))
    exclusion = _Exclusion(modules, exclude)
    known: dict[int, Weight] = {}
    for path, module in modules.items():
        for attribute, param in module._parameters.items():
            if param is not None:
                weight = known.setdefault(id(param), Weight(param))
                weight.add(module, attribute, _join(path, attribute))
                weight.excluded |= exclusion.covers(path, attribute)
    chosen: dict[int, Weight] = {}
    for path, module in modules.items():
        for attribute in _weight_attributes(module, embeddings):
            if exclusion.covers(path, attribute):
                continue
            name, param = _join(path, attribute), module._parameters.get(attribute)
            if param is None:
                _refuse_computed(module, attribute, name)
            weight = known[id(param)]
            if not weight.excluded:
                _check(weight)
                chosen[id(param)] = weight
    exclusion.check_all_met()
    weights = [weight for weight in chosen.values() if weight.param.numel() > 0]
    if not weights:
        raise ValueError(
            "compand: expected a model with weights of linear or convolution layers, got a "
            f"{type(model).__name__} with none"
            + (" that is not excluded" if exclusion.items else "; embeddings=True takes embeddings too")
        )
    return weights


def _join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def _weight_attributes(module: nn.Module, embeddings: bool) -> Iterator[str]:
    if isinstance(module, _LAYERS) or (embeddings and isinstance(module, _EMBEDDINGS)):
        yield "weight"
    elif isinstance(module, nn.MultiheadAttention):
        for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(module, attribute) is not None:
                yield attribute


class _Exclusion:
    """What :func:`compand` is asked to leave out."""

    def __init__(self, modules: dict[str, nn.Module], exclude: Exclude | Iterable[Exclude]) -> None:
        self.modules = modules
        if isinstance(exclude, (str, nn.Module, type)) or not isinstance(exclude, Iterable):
            exclude = [exclude]
        self.items = list(exclude)
        for item in self.items:
            if not (isinstance(item, (str, nn.Module)) or (isinstance(item, type) and issubclass(item, nn.Module))):
                raise TypeError(
                    "compand: expected exclude to hold names of weights or modules, modules, or types of modules, got "
                    f"{item!r}"
                )
        self.unmet = {item for item in self.items if not isinstance(item, type)}

    def covers(self, path: str, attribute: str) -> bool:
        """Whether the weight, its module or a module around it is excluded."""
        parts = path.split(".") if path else []
        paths = [".".join(parts[:end]) for end in range(len(parts) + 1)]  # from the model, "", to the module itself
        names = [*paths[1:], _join(path, attribute)]
        around = [self.modules[outer] for outer in paths]
        covered = False
        for item in self.items:
            if isinstance(item, str):
                met = any(fnmatchcase(name, item) for name in names)
            elif isinstance(item, nn.Module):
                met = any(module is item for module in around)
            else:
                met = any(isinstance(module, item) for module in around)
            if met:
                self.unmet.discard(item)
                covered = True
        return covered

    def check_all_met(self) -> None:
        for item in self.items:
            if item in self.unmet:
                named = repr(item) if isinstance(item, str) else f"a {type(item).__name__}"
                raise ValueError(
                    f"compand: expected exclude to name weights or modules of the model, got {named}, which fits none; "
                    "names are those of model.named_parameters() and model.named_modules()"
                )


def _refuse_computed(module: nn.Module, attribute: str, name: str) -> None:
    if not parametrize.is_parametrized(module, attribute):
        raise ValueError(
            f"compand: expected {name} to be a parameter, got one that is computed (weight_norm, pruning?); undo that "
            "first, or leave it out with exclude"
        )
    parametrizations = list(parametrization_of(module, attribute))
    if any(isinstance(other, WeightCompander) for other in parametrizations):
        raise ValueError(
            f"compand: expected weights that are not companded, but {name} is; call pyreg.decompand(model) first, or "
            "leave it out with exclude"
        )
    raise ValueError(
        f"compand: expected {name} to have no parametrization, got {type(parametrizations[0]).__name__}; remove it "
        "first, or leave it out with exclude"
    )


def _check(weight: Weight) -> None:
    name, param = weight.name, weight.param
    if nn.parameter.is_lazy(param):
        raise ValueError(
            f"compand: expected {name} to be initialized, got a lazy parameter; call the model once with data first"
        )
    if param.dtype not in _library.FLOAT_DTYPES:
        raise TypeError(f"compand: expected {name} to be float64, float32, bfloat16 or float16, got {param.dtype}")
    for module, attribute in weight.places:
        if isinstance(module, parametrize.ParametrizationList):
            raise ValueError(
                f"compand: expected {name} to have no parametrization, but a parameter that it is tied to has one; "
                "remove it first, or leave the weight out with exclude"
            )
        if isinstance(module, _EMBEDDINGS) and attribute == "weight" and (module.sparse or module.max_norm is not None):
            option = "sparse=True" if module.sparse else f"max_norm={module.max_norm}"
            raise ValueError(
                f"compand: expected {name} to be used with sparse=False and max_norm=None, got {option}: the compander "
                "needs dense gradients, and weights that only the optimizer changes; set that, or use exclude"
            )


def companded_weights(model: nn.Module) -> list[Weight]:
    weights: dict[int, Weight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module):
            for attribute, parametrization in module.parametrizations.items():
                if isinstance(parametrization[0], WeightCompander):
                    v = parametrization.original
                    weights.setdefault(id(v), Weight(v)).add(module, attribute, _join(path, attribute))
    return list(weights.values())


def parametrization_of(module: nn.Module, attribute: str) -> parametrize.ParametrizationList:
    return module.parametrizations[attribute]  # type: ignore[index, return-value]
