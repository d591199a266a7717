"""Optimisation: groups of parameters, learning rate, precision, and the moving average of the weights."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sat.config.check import build, hint, resolve
from sat.config.schema import Component, GroupConfig, TrainConfig, plain
from sat.errors import UserError
from sat.train.objectives import Objective

if TYPE_CHECKING:
    from sat.train.backend import Backend

log = logging.getLogger(__name__)


class RateError(UserError, ValueError):
    """Groups or a scheduler that do not fit what is trained."""


class ParameterGroup(TypedDict, total=False):
    """A parameter group as torch optimizers take it; ``lr_scale``: its rate over ``train.lr``.

    ``matrices``: weights and kernels of layers, which decay. ``role``: of an objective whose roles learn in
    turn (:func:`rest`).
    """

    params: list[nn.Parameter]
    weight_decay: float
    lr: float
    lr_scale: float
    matrices: bool
    role: str


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that receive gradients, by name, each once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def group_of(module: Objective, name: str, train: TrainConfig) -> str:
    """The group of the parameter ``name`` in the metrics: of ``train.groups``, else its part."""
    parts = {id(inner): part for part, inner in module.parts().items()}
    owner, _, rest = name.partition(".")
    part = parts.get(id(getattr(module, owner, None)), owner)
    for place, entry in enumerate(train.groups):
        if any(fnmatchcase(other, target) for other in (f"{part}.{rest}", name) for target in entry.targets):
            return f"group_{place}"
    return part


def groups(  # noqa: C901 - parameters, their owners, the groups
    module: nn.Module,
    weight_decay: float,
    own: Sequence[GroupConfig] = (),
    lr: float = 0.0,
    *,
    told: bool = True,
) -> list[ParameterGroup]:
    """Trainable parameters in a decayed and an undecayed group; an empty group is left out.

    Matrices and convolution kernels decay. Biases, norms, embeddings and position tables do not: shrinking
    them towards zero does not make the function simpler. What ``own`` names (``train.groups``; ``lr`` is the
    others' rate) follows in groups apart, ``told`` in the log; names are those of the objective's parts
    (``text.blocks.0.…``), or of ``module`` itself. Raises :class:`RateError` for a pattern that matches
    nothing, or nothing that an earlier one has left.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_matrix = name == "weight" and parameter.ndim >= 2 and not isinstance(owner, nn.Embedding)
            (decayed if is_matrix else kept).append(parameter)
    if not seen:
        raise ValueError("nothing to train: the objective has no parameter that requires a gradient")
    pairs = ((decayed, weight_decay, True), (kept, 0.0, False))
    if not own:
        return [
            {"params": params, "weight_decay": decay, "matrices": matrices}
            for params, decay, matrices in pairs
            if params
        ]

    names = {id(p): name for name, p in module.named_parameters() if id(p) in seen}
    for part, inner in module.parts().items() if isinstance(module, Objective) else ():
        names |= {id(p): f"{part}.{name}" for name, p in inner.named_parameters() if id(p) in seen}
    known, place_of = list(names.values()), dict[str, int]()
    for place, entry in enumerate(own):
        for target in entry.targets:
            at, hits = f"train.groups.{place}: {target!r}", [n for n in known if fnmatchcase(n, target)]
            if not hits:
                near = hint(target, known) or f" (they are {known[0]} to {known[-1]})"
                raise RateError(f"{at} matches no trained parameter{near}")
            if all(place_of.get(name, place) != place for name in hits):
                first = place_of[hits[0]]
                raise RateError(
                    f"{at} matches only what train.groups.{first} has: put the narrower one first"
                )
            for name in hits:
                place_of.setdefault(name, place)

    found: list[ParameterGroup] = []
    everything: list[tuple[int | None, GroupConfig]] = [(None, GroupConfig(["*"], lr)), *enumerate(own)]
    for number, entry in everything:
        rate_of = entry.lr or lr
        decay_of = weight_decay if entry.weight_decay is None else entry.weight_decay
        lines = []
        for params, decay, what in ((decayed, decay_of, f"decay {decay_of:g}"), (kept, 0.0, "no decay")):
            if inside := [p for p in params if place_of.get(names[id(p)]) == number]:
                rates: ParameterGroup = {"lr": rate_of, "lr_scale": rate_of / lr}
                found.append(
                    {"params": inside, "weight_decay": decay, "matrices": params is decayed, **rates}
                )
                lines.append(f"{len(inside)} parameters ({sum(p.numel() for p in inside):,}) with {what}")
        if entry.weight_decay and not any("with decay" in text for text in lines):
            raise RateError(
                f"train.groups.{number}: `weight_decay` is for matrices and kernels, it names none"
            )
        which = "the others" if number is None else f"train.groups.{number} ({', '.join(entry.targets)})"
        if told:
            log.info("%s: lr %g, %s", which, rate_of, " and ".join(lines) or "none left")
    return found


class Muon(Optimizer):
    """Muon for the matrices of linear layers, AdamW for kernels, embeddings, norms and biases.

    With ``kernels`` a kernel (O, I, h, w) is a matrix (O, I h w) of Muon's too. Both are torch's. A matrix
    moves along its momentum (``nesterov``) made nearly orthogonal by ``ns_steps`` of Newton and Schulz,
    scaled to the size of AdamW's steps, so that one ``lr`` and one ``weight_decay`` fit both. ``betas`` and
    ``eps`` are AdamW's. Groups come from :func:`groups`. The backend must be plain: with DeepSpeed an
    optimizer may see flat vectors. Source: K. Jordan, "Muon" (2024); arXiv:2502.16982, eq. 4.
    """

    needs_matrices = True

    def __init__(  # noqa: PLR0913 - the fields of the YAML component
        self,
        params: Sequence[ParameterGroup],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        kernels: bool = False,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"Muon needs torch 2.9 or newer, this is {torch.__version__}")
        split: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in params:
            for flat in (True, False):
                wanted = [
                    p
                    for p in group["params"]
                    if (group.get("matrices", False) and (p.ndim == 2 or kernels)) == flat
                ]
                if wanted:
                    split[flat].append({"lr": lr, "weight_decay": weight_decay, **group, "params": wanted})
        self._kernels = [p for group in split[True] for p in group["params"] if p.ndim > 2]
        super().__init__([*split[True], *split[False]], {"lr": lr, "weight_decay": weight_decay})
        self._inner: list[Optimizer] = []
        if split[True]:
            scaled: Any = {"adjust_lr_fn": "match_rms_adamw", "momentum": momentum, "nesterov": nesterov}
            with _flat(self._kernels):
                self._inner.append(torch.optim.Muon(split[True], lr, ns_steps=ns_steps, **scaled))
        if split[False]:
            self._inner.append(torch.optim.AdamW(split[False], lr, betas, eps, fused=True))
        self.param_groups = [group for inner in self._inner for group in inner.param_groups]
        self._share()

    def _share(self) -> None:
        """Give the two one state, and the groups that rates are written into."""
        left = list(self.param_groups)
        for inner in self._inner:
            count = len(inner.param_groups)
            inner.state, inner.param_groups, left = self.state, left[:count], left[count:]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` of another one gave."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step all parameters; ``closure`` is not called."""
        with _flat(self._kernels):
            for inner in self._inner:
                inner.step()


@contextmanager
def _flat(kernels: Sequence[nn.Parameter]) -> Iterator[None]:
    """Kernels (O, I, h, w) and their gradients as matrices (O, I h w), and back afterwards."""
    shapes, grads = [p.shape for p in kernels], [p.grad for p in kernels]
    for p, grad in zip(kernels, grads, strict=True):
        p.grad, p.data = None, p.data.flatten(1)
        p.grad = None if grad is None else grad.flatten(1)
    try:
        yield
    finally:
        for p, grad, shape in zip(kernels, grads, shapes, strict=True):
            p.grad, p.data = None, p.data.view(shape)
            p.grad = grad


def by_role(objective: Objective, groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
    """``groups``, each cut up by the roles of its parameters, where the objective has several."""
    roles = {id(p): objective.role(name) for name, p in trainable(objective).items()}
    if len(names := list(dict.fromkeys(roles.values()))) == 1:
        return list(groups)
    parts = [
        (group, role, [p for p in group["params"] if roles[id(p)] == role])
        for group in groups
        for role in names
    ]
    return [{**group, "params": params, "role": role} for group, role, params in parts if params]


def rest(optimizer: Optimizer, roles: Collection[str]) -> None:
    """Leave the groups of ``roles``, with their state, out of the next steps; of none: all take part."""
    for group in optimizer.param_groups:
        if "role" in group:
            group["rests"] = group["role"] in roles


def with_rests(optimizer: Optimizer) -> Optimizer:
    """``optimizer`` whose step skips groups that :func:`rest` names, also where each is stepped alone."""
    if not any("role" in group for group in optimizer.param_groups):
        return optimizer
    step: Callable[..., Any] = optimizer.step

    def skipping(*args: Any, **kwargs: Any) -> Any:
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if not group.get("rests")]
        try:
            return step(*args, **kwargs) if optimizer.param_groups else None
        finally:
            optimizer.param_groups = groups

    optimizer.step = skipping  # type: ignore[method-assign]
    return optimizer


def build_optimizer(train: TrainConfig, imports: Sequence[str], groups: Sequence[Any]) -> Optimizer:
    """``train.optimizer`` over parameter groups.

    Torch's own optimizers run fused where they can, unless the YAML chooses an implementation.
    """
    if train.schedule == "constant" and train.min_lr_ratio:
        log.warning(
            "train.min_lr_ratio %g has no effect: train.schedule is constant; set it to 0, or choose a "
            "schedule that falls", train.min_lr_ratio,
        )  # fmt: skip
    given = train.optimizer.params
    fused = resolve(train.optimizer.target, imports) in (
        torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad
    ) and not {"fused", "foreach", "differentiable"} & set(given)  # fmt: skip
    component = replace(train.optimizer, params={"fused": True, **given} if fused else given)
    optimizer: Optimizer = build(component, imports=imports, params=groups, lr=train.lr)
    return with_rests(optimizer)


def rate(step: int, config: TrainConfig, cycles: Sequence[int] = ()) -> float:
    """Learning rate of ``step`` (0-based): linear warm-up, then ``config.schedule``, to ``min_lr_ratio``.

    Cosine and ``linear`` fall over all steps, ``wsd`` linearly over the last ``decay_steps``;
    ``inverse_sqrt`` is sqrt(w / (w + n)) after n steps behind a warm-up of w (at least 1).

    ``cycles`` are the steps at which schedules end, one of ``config.steps`` without them. A later one warms
    up from the last rate of the one before; behind the last one that rate stays. A pure function of the
    step, so there is no scheduler state to save.
    """
    start, end, before = 0, config.steps, 0.0
    for end in cycles:
        if step < end or end == cycles[-1]:
            break
        start, before = end, rate(end - 1, config, cycles)
    place = min(step, end - 1) - start if cycles else step
    warmup = min(config.warmup, end - start) if start else config.warmup
    if place < warmup:
        return before + (config.lr - before) * (place + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    past, whole, floor = place - warmup, end - start - warmup, config.min_lr_ratio
    if config.schedule == "inverse_sqrt":
        return config.lr * max(floor, math.sqrt(max(1, warmup) / (max(1, warmup) + past)))
    if config.schedule == "wsd":
        falls = min(config.decay_steps or whole, whole)
        past, whole = max(0, past - (whole - falls)), falls
    progress = min(1.0, past / max(1, whole))
    if config.schedule == "cosine":
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return config.lr * (1 - (1 - floor) * progress)


def prolonged(
    config: TrainConfig, step: int, steps: int | None, cycles: Sequence[int]
) -> tuple[list[int], str]:
    """Cycles of the schedule of a run that goes on at ``step``, and a line for the user where they change.

    The run was made for ``steps`` (None: not known) with ``cycles``, and is for ``config.steps`` now.
    """
    if steps is None or steps == config.steps or step >= config.steps or config.schedule == "constant":
        return list(cycles) or [config.steps], ""
    cycles, name = list(cycles) or [steps], config.schedule
    if isinstance(name, Component):
        return cycles, (
            f"train.steps {steps} -> {config.steps}: {name.target} goes on by its own `params`, which no "
            f"train.prolong changes"
        )
    stretched = [end for end in cycles[:-1] if end < config.steps] + [config.steps]
    ways = {
        "stretch": (stretched, f"the {name} now ends at step {config.steps}"),
        "constant": (cycles, f"the last rate of the {name} is kept behind it"),
        "rewarm": (
            sorted({*cycles, steps, config.steps}),
            f"a second {name} follows, after train.warmup steps",
        ),
    }
    way = config.prolong if config.steps > steps else "stretch"
    now, words = ways[way]
    if name == "inverse_sqrt" and way == "stretch" and len(cycles) == 1:
        return now, ""  # which has no end: the same rates
    was, follows = rate(step - 1, config, cycles), rate(step, config, now)
    last = rate(config.steps - 1, config, now)
    return now, (
        f"train.steps {steps} -> {config.steps}: {words} (train.prolong={way}): the learning rate goes from "
        f"{was:.2g} to {follows:.2g} at step {step + 1} and ends at {last:.2g}; the other ways are "
        f"{' and '.join(name for name in ways if name != way)} (docs/training.md)"
    )


def set_rate(optimizer: Optimizer, value: float) -> None:
    """Write the learning rate into every group, by its scale (a tensor rate is filled in place)."""
    for group in optimizer.param_groups:
        own = value * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


class Scheduler:
    """``config.schedule`` by its path over the groups of ``optimizer``, stepped once a step.

    It may change any option of the groups. Raises :class:`RateError` where it overrides ``train.groups``, or
    ends before ``train.steps``.
    """

    def __init__(self, config: TrainConfig, imports: Collection[str], optimizer: Optimizer) -> None:
        component, self._optimizer = config.schedule, optimizer
        assert isinstance(component, Component), "others are :func:`rate`"
        self._target = component.target
        self._given = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        rates = [float(given["lr"]) for given in self._given]
        self._identity = {"schedule": plain(component), "rates": rates}
        self._made = build(component, imports=imports, optimizer=optimizer)
        name, end = type(self._made).__name__, getattr(self._made, "total_steps", None)
        if end is not None and end < config.steps:
            raise RateError(
                f"{name} ends after {end} steps, train.steps is {config.steps}: let both be the same"
            )
        warnings.filterwarnings(  # a first step that was skipped, or is made up for, is meant
            "ignore", r"Detected call of `lr_scheduler.step\(\)` before"
        )
        bases = [float(group["initial_lr"]) for group in optimizer.param_groups]
        if bases != rates:
            if len(set(rates)) > 1:
                raise RateError(f"{name} sets its own rates, which override `lr` in train.groups: drop one")
            log.warning("%s begins at its own rate %g: train.lr %g is not used", name, bases[0], rates[0])
        self._touched = self._changed()

    def _changed(self) -> set[str]:
        """Options of the groups that differ from those that the optimizer was built with."""
        pairs = list(zip(self._optimizer.param_groups, self._given, strict=True))
        return {"lr"} | {k for now, was in pairs for k in now if k != "params" and now[k] != was.get(k, was)}

    @property
    def rate(self) -> float:
        """Learning rate of the first group for the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Set the rates of the step after this one."""
        self._made.step()

    def state_dict(self) -> dict[str, Any]:
        """Copy of all that :meth:`load` needs."""
        self._touched |= self._changed()
        options = [{k: g[k] for k in self._touched if k in g} for g in self._optimizer.param_groups]
        return copy.deepcopy({**self._identity, "state": self._made.state_dict(), "groups": options})

    def load(self, state: Mapping[str, Any] | None, steps: int) -> None:
        """Go on from ``state``; one of another schedule, or none, is made up for by ``steps`` steps."""
        if state is not None and {k: state[k] for k in self._identity} == self._identity:
            self._made.load_state_dict(state["state"])
            for group, options in zip(self._optimizer.param_groups, state["groups"], strict=True):
                group.update(options)
            self._touched |= set().union(*state["groups"])
            return
        log.warning(
            "the checkpoint was written by another train.schedule (or its `params`, or train.lr): %s goes on "
            "as if it had made the %d steps", self._target, steps,
        )  # fmt: skip
        for _ in range(steps):
            self.step()


def autocast(config: TrainConfig, device: str) -> AbstractContextManager[Any]:
    """bf16 computation with float32 weights on a ``device`` type, where ``train.autocast`` asks for it."""
    return nullcontext() if config.autocast is None else torch.autocast(device, torch.bfloat16)


class Ema:
    """Exponential moving averages, in float32, of the weights: whole at ZeRO 0, else of this rank's masters.

    A decay after n steps is ``min(decay, n / (9 + n))``, so that early averages forget the random start.
    ``averages`` are those of each of ``decays``, flat, by the name of the parameter; ``shards`` the first.
    """

    def __init__(self, engine: Backend, decays: Sequence[float]) -> None:
        self._engine = engine
        self.decays = list(decays)
        self._masters = [fragment.master for fragment in engine.fragments.values()]
        self.averages: list[dict[str, Tensor]] = [{} for _ in decays]
        self.restart(range(len(decays)))

    @property
    def shards(self) -> dict[str, Tensor]:
        """Average of the first decay."""
        return self.averages[0]

    def restart(self, places: Iterable[int]) -> None:
        """Set the averages of the decays at ``places`` to the current weights."""
        for place in places:
            self.averages[place] = {
                name: fragment.master.float().clone() for name, fragment in self._engine.fragments.items()
            }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights after ``step`` steps."""
        for decay, average in zip(self.decays, self.averages, strict=True):
            torch._foreach_lerp_(list(average.values()), self._masters, 1 - min(decay, step / (9 + step)))

    def gather(self, place: int = 0) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 average of a decay) one by one; every rank must go through all of them."""
        for name in self._engine.parameters:
            yield name, self._engine.whole(name, self.averages[place].get(name))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in place of the weights inside the block, and the exact old weights after it."""
        parameters = self._engine.parameters
        keeps_itself = self._engine.config.zero == 3
        with self._engine.unsharded():
            old = {} if keeps_itself else {name: p.detach().clone() for name, p in parameters.items()}
            try:
                for name, value in self.gather():
                    parameters[name].detach().copy_(value)
                yield
            finally:
                for name, value in old.items():
                    parameters[name].detach().copy_(value)
