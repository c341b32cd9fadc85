"""The weight compander on all weights of a model (arXiv 2306.16993): :func:`compand` and :func:`decompand`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyreg._companded_weight import CompandedWeight, JointPass
from pyreg._weight_selection import Exclude, Weight, companded_weights, parametrization_of, weights_to_compand
from pyreg.nn import WeightCompander, compander_constant
from pyreg.ops._options import Kind
from pyreg.ops.weight_compander import KINDS

__all__ = ["Companding", "compand", "decompand"]

_PER = ("layer", "channel", "model")


@dataclass(frozen=True)
class Companding:
    """The companded weights of a model, as :func:`pyreg.compand` returns it."""

    model: nn.Module

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The trained ``v`` of each companded weight by the name of the weight; tied ones under their first name."""
        return {weight.name: weight.param for weight in companded_weights(self.model)}

    @property
    def constants(self) -> list[nn.Parameter]:
        """The learned ``a`` and ``b``, each once: the paper trains them by plain SGD, in an optimizer of their own."""
        modules = (module for module in self.model.modules() if isinstance(module, WeightCompander))
        return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))

    def remove(self) -> None:
        """:func:`pyreg.decompand` of the model."""
        decompand(self.model)


def compand(
    model: nn.Module,
    a: Tensor | float = 0.5,
    b: Tensor | float = 1.0,
    *,
    learnable: bool = True,
    kind: Kind = "arctan",
    per: Literal["layer", "channel", "model"] = "layer",
    exclude: Exclude | Iterable[Exclude] = (),
    embeddings: bool = False,
    clamp: bool = False,
) -> Companding:
    r"""Trains the weights of a model through a saturating function, in place.

    .. code-block:: text

        w = Psi(v) = a f(v / b),    f: arctan, arsinh or erf

    Every weight of a linear or (transposed) convolution layer and every projection of ``nn.MultiheadAttention`` becomes
    ``Psi(v)`` of a trained ``v``, never a bias or a normalisation's scale. ``v`` is found from the weight by the
    inverse of ``Psi``: the model computes what it did, to rounding. The parameters stay the objects that they were and
    hold ``v`` from now on; train them with :class:`pyreg.optim.CompandedOptimizer` or with any optimizer, and call
    :func:`decompand` when done: at inference nothing is left to pay.

    All weights are computed in one pass when the forward of ``model`` begins, with the parameters of that moment. A
    layer that is called alone, or a weight that is read outside of the model's forward, is computed by itself; so is a
    weight whose parameters the forward itself replaces, changes, freezes or releases, but for changes that nothing
    tells of: in place through ``.data``, or under ``torch.compile``. All
    gradients are formed in one pass at the end of the backward: until then those by ``w`` are held, a copy of the
    weights more, and ``DistributedDataParallel`` has nothing of them to reduce.

    Args:
        model: the module whose calls train it; inside of ``DistributedDataParallel`` or ``torch.compile``, not the
            wrapper. Its ``state_dict`` then has, in place of ``layer.weight``,
            ``layer.parametrizations.weight.original`` (``v``), ``.0.a`` and ``.0.b``.
        a, b: finite numbers other than 0, or tensors of one element; start values if ``learnable``.
        learnable: whether ``a`` and ``b`` are trained, or buffers. Those of frozen weights never are.
        kind: ``"arctan"`` (``|w| < |a| pi / 2``), ``"arsinh"`` (any ``w``) or ``"erf"`` (``|w| < |a|``).
        per: one ``(a, b)`` for each weight tensor (``"layer"``, the paper's learned form), for each slice of its
            dimension 0 (``"channel"``: output features or channels, input channels of transposed convolutions), or
            for all (``"model"``, the paper's fixed form). In float32 for bfloat16 and float16 weights.
        exclude: what to leave out, one or several: a name of a weight or module, with wildcards (``"head"``,
            ``"encoder.*.conv1.weight"``); a module; a type of modules. Modules are left out with all within them.
        embeddings: whether ``nn.Embedding`` and ``nn.EmbeddingBag`` take part.
        clamp: brings weights beyond the range of ``Psi`` to its border, where they would be an error; these change.

    Tied weights (one parameter in several modules) are companded once wherever they are used, and stay tied: if one of
    their modules takes part, and none is excluded. Modules outside of ``model`` are not seen, so compand the whole.

    Returns:
        :class:`~pyreg.companding.Companding`: the companded weights and learned constants.

    Raises:
        TypeError: something else than such arguments; weights of other dtypes than float64, float32, bfloat16, float16.
        ValueError: values out of what is said above; a weight beyond the range of ``Psi``; a weight that is companded
            already or has another parametrization; a lazy layer that has seen no data; a meta tensor; embeddings with
            ``sparse=True`` or ``max_norm``; nothing to compand; an ``exclude`` that fits nothing. The model is left as
            it was.

    Pickling (``torch.save(model)``) is refused, as for every parametrized module: save ``model.state_dict()`` and load
    it into a model companded alike, or :func:`decompand` first. ``copy.deepcopy`` works.

    Source: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", arXiv
    2306.16993.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> companding = pyreg.compand(model, a=0.5, b=1.0)
        >>> list(companding.weights)
        ['0.weight', '2.weight']
        >>> pyreg.decompand(model)
        >>> type(model[0].weight)
        <class 'torch.nn.parameter.Parameter'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compand: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if kind not in KINDS:
        raise ValueError(f"compand: expected kind to be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if per not in _PER:
        raise ValueError(f"compand: expected per to be 'layer', 'channel' or 'model', got {per!r}")
    starts = {name: compander_constant("compand", name, value, torch.float64) for name, value in (("a", a), ("b", b))}
    for name, start in starts.items():
        if start.numel() != 1:
            raise ValueError(
                f"compand: expected {name} to be a number or a tensor of one element, got shape {list(start.shape)}; "
                "with per='channel' every channel starts from that one value"
            )

    weights = weights_to_compand(model, exclude, embeddings)
    companders = _companders(weights, starts["a"], starts["b"], learnable, kind, per, clamp)
    vs = [_inverse(weight, compander) for weight, compander in zip(weights, companders, strict=True)]
    _parametrize(weights, companders, vs)
    JointPass([weight.parametrization for weight in weights]).add_to(model)
    return Companding(model)


def decompand(model: nn.Module) -> None:
    """Makes the companded weights of a model plain parameters again, in place: ``w`` takes the place of ``v``.

    The model computes what it did, and the parameters stay the objects that they were, tied ones tied. ``a``, ``b`` and
    the hooks of :func:`compand` are gone. A weight that :class:`pyreg.nn.WeightCompander` was registered on by hand is
    folded in too.

    Args:
        model: a module with companded weights.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: it has no companded weight; one of them has another parametrization on top. The model is left as it
            was.

    Source: as of :func:`compand`.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> companding = pyreg.compand(model)
        >>> before = model.weight.detach()
        >>> pyreg.decompand(model)
        >>> torch.equal(model.weight, before)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"decompand: expected model to be a torch.nn.Module, got {type(model).__name__}")
    weights = companded_weights(model)
    if not weights:
        raise ValueError(
            "decompand: expected a model with companded weights, got one without; call pyreg.compand first"
        )
    for weight in weights:
        if len(weight.parametrization) > 1:
            others = ", ".join(type(other).__name__ for other in list(weight.parametrization)[1:])
            raise ValueError(
                f"decompand: expected {weight.name} to have no parametrization on top of the compander, got {others}; "
                "remove it first with torch.nn.utils.parametrize.remove_parametrizations"
            )
    with torch.no_grad():
        values = [weight.parametrization() for weight in weights]
    for weight, w in zip(weights, values, strict=True):
        _make_plain(weight.places, weight.param, w)
    for module in model.modules():
        JointPass.remove_from(module)


# ---- companding them ----


def _companders(
    weights: list[Weight], a: Tensor, b: Tensor, learnable: bool, kind: Kind, per: str, clamp: bool
) -> list[CompandedWeight]:
    params = [weight.param for weight in weights]
    devices = list(dict.fromkeys(str(param.device) for param in params))
    if per == "model" and len(devices) > 1:
        raise ValueError(
            f"compand: expected the weights on one device for per='model', got {' and '.join(devices)}; use per='layer'"
        )
    dtypes = [torch.promote_types(param.dtype, torch.float32) for param in params]
    shared: CompandedWeight | None = None
    companders = []
    for param, dtype in zip(params, dtypes, strict=True):
        learned = learnable and param.requires_grad
        if per == "model":
            dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        shape = param.shape[:1] if per == "channel" else ()
        start_a, start_b = (start.to(param.device, dtype).reshape(()).expand(shape) for start in (a, b))
        compander = CompandedWeight(start_a, start_b, learned, kind, clamp)
        if per == "model" and learned:
            shared = shared or compander
            compander.a, compander.b = shared.a, shared.b
        companders.append(compander)
    return companders


@torch.no_grad()
def _inverse(weight: Weight, compander: CompandedWeight) -> Tensor:
    if weight.param.is_meta:
        raise ValueError(
            f"compand: expected {weight.name} to hold values, got a tensor on the meta device; initialize the model on "
            "a device first"
        )
    try:
        return compander.right_inverse(weight.param)
    except ValueError as error:
        raise ValueError(f"compand: {weight.name}: {error}") from error


def _parametrize(weights: list[Weight], companders: list[CompandedWeight], vs: list[Tensor]) -> None:
    """Gives every place of every weight its compander; if one cannot have it, none has."""
    before = [weight.param.detach() for weight in weights]
    orders = {module: list(module._parameters) for weight in weights for module, _ in weight.places}
    done: list[list[tuple[nn.Module, str]]] = []
    try:
        for weight, compander, v in zip(weights, companders, vs, strict=True):
            done.append([])
            with torch.no_grad():
                weight.param.set_(v)  # type: ignore[call-overload]
            for module, attribute in weight.places:
                _unshare_class(module)
                # Not with the compander itself: torch would take the inverse again in every place of a tied weight.
                parametrize.register_parametrization(module, attribute, nn.Identity(), unsafe=True)
                done[-1].append((module, attribute))
                parametrization = parametrization_of(module, attribute)
                parametrization[0] = compander
                parametrization.train(module.training)
                parametrization.parameter_order = orders[module]  # type: ignore[assignment]
    except BaseException:
        for weight, places, w in zip(weights, done, before, strict=False):
            _make_plain(places, weight.param, w)
        raise


def _make_plain(places: list[tuple[nn.Module, str]], param: nn.Parameter, w: Tensor) -> None:
    """Takes the parametrization away and leaves ``w``, with the module's parameters in the order they once had."""
    for module, attribute in places:
        order: Any = getattr(parametrization_of(module, attribute), "parameter_order", ())
        _unshare_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        rank = {name: index for index, name in enumerate(order)}
        params = sorted(module._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
        module._parameters.clear()
        module._parameters.update(params)
    with torch.no_grad():
        param.set_(w)  # type: ignore[call-overload]


def _unshare_class(module: nn.Module) -> None:
    """Gives a parametrized module the class it would have without copies.

    torch makes a class for each parametrized module, whose properties compute the weights. ``copy.deepcopy`` shares it,
    so that to add or remove a property would break the other modules.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)
