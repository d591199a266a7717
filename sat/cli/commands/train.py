"""The work behind ``train.py``: check the config, build what it names, and run the loop."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from sat.checkpoint.digest import digest
from sat.checkpoint.format import PARTS
from sat.cli.main_guard import UsageError
from sat.config.build import build_engine
from sat.config.component import build
from sat.config.load import Loaded, dump, load_full
from sat.config.record import record
from sat.config.schema import CheckpointConfig, DataConfig, Experiment, TrainConfig, plain
from sat.config.targets import resolve
from sat.config.yaml_source import ConfigError, Problem
from sat.data.dataset import Items
from sat.data.loader import Loader, validation_batches
from sat.engine import DiffusionEngine
from sat.errors import LostRankError
from sat.kernels.apply import compiled, use_kernel
from sat.parallel.collectives import barrier, from_main, lost_rank_message
from sat.parallel.launch import Runtime, keep_freed_memory, launch
from sat.parallel.mesh import Mesh
from sat.parallel.sequence import apply_sequence
from sat.pipeline import DTYPES
from sat.sampling.inputs import InputFolder
from sat.train import optim
from sat.train.checkpoints import exporter
from sat.train.data import Caches, DataSets, bucket_rule, in_memory, open_data
from sat.train.deepspeed import TrainEngine, check_dtype
from sat.train.log import Record, token_counter
from sat.train.loop import Extras, Trainer
from sat.train.lora import add_lora, pack_frozen, unpacked
from sat.train.objectives import Objective
from sat.train.pictures import Pictures
from sat.train.resume import NATIVE, RunFolder, Saved
from sat.util import log as logs

log = logging.getLogger(__name__)


def work(args: argparse.Namespace, settings: Sequence[tuple[str, object]]) -> int:
    """What ``train.py`` does with parsed arguments; the exit code."""
    logs.setup(debug=args.debug)
    loaded = load_full(args.base, [*args.overrides, *settings])
    experiment = _with_folder(loaded.experiment, args.base)
    if args.print_config:
        print(dump(experiment), end="")
        return 0
    train, data = _sections(experiment)
    _refuse_quantised(experiment, train)
    if args.check:
        return _check(loaded, train, data)
    if args.plan:
        from sat.cli.commands.estimate import estimate

        estimate(experiment, args.ranks, args.fit)
        return 0
    if loaded.missing:
        raise ConfigError(loaded.missing)
    runtime = launch(experiment.parallel.device, experiment.parallel.timeout, group=True)
    logs.setup(runtime.rank, debug=args.debug)
    for notice in loaded.notices:
        log.warning("%s", notice)
    check_dtype(train, runtime)
    try:
        _train_rounds(experiment, train, data, runtime)
    except RuntimeError as error:
        if (line := lost_rank_message(error)) is not None:
            raise LostRankError(line) from error
        raise
    if runtime.world > 1:  # alone, the group stays for another run in this process: DeepSpeed remembers it
        runtime.close()
    return 0


def _with_folder(experiment: Experiment, bases: Sequence[str]) -> Experiment:
    """``experiment`` with a run folder: the config's, or one that is named after the last of its files."""
    if experiment.output.dir is not None:
        return experiment
    output = replace(experiment.output, dir=Path("runs") / Path(bases[-1]).stem)
    return replace(experiment, output=output)


def _sections(experiment: Experiment) -> tuple[TrainConfig, DataConfig]:
    """The train and data sections, which training cannot do without."""
    if experiment.train is None or experiment.data is None:
        name = "train" if experiment.train is None else "data"
        raise UsageError(
            f"the config has no `{name}` section: lay a training config over it, such as configs/sft.yaml"
        )
    if experiment.parallel.guidance > 1:
        raise UsageError(
            f"parallel.guidance {experiment.parallel.guidance} shares the two halves of guidance, and a "
            f"training step has one: set it to 1, and its ranks read other images"
        )
    if experiment.train.tensorboard and find_spec("tensorboard") is None:
        raise UsageError("train.tensorboard needs a package: pip install tensorboard, or set it to false")
    return experiment.train, experiment.data


def _refuse_quantised(experiment: Experiment, train: TrainConfig) -> None:
    """An error where weights are to be trained that are kept as small integers."""
    if experiment.adapters.lora is not None:
        return
    params, kept = train.objective.params, experiment.memory.quantize
    needs = resolve(train.objective.target, experiment.imports).needs(params)
    trained = {"network": "model" in needs, "text_encoder": bool(params.get("train_text"))}
    if broken := [name for name, is_trained in trained.items() if is_trained and getattr(kept, name)]:
        what = (
            "its weights are trained, which needs them plain: set it to null, or train low-rank factors "
            "beside them (configs/lora.yaml)"
        )
        raise ConfigError([Problem("memory.quantize", name, what) for name in broken])


def _check(loaded: Loaded, train: TrainConfig, data: DataConfig) -> int:
    """Say that the config is good, and what it still needs."""
    for line in [*loaded.notices, *map(str, loaded.missing)]:
        print(f"note: {line}")
    precision = train.dtype if train.autocast is None else f"{train.dtype} with {train.autocast} autocast"
    print(
        f"config ok: {train.steps} steps of {train.batch_size} x {train.accumulate} images a data rank at "
        f"{_sizes(data)}, {precision}, ZeRO {train.zero}"
    )
    return 0


def _sizes(data: DataConfig) -> str:
    """What the images are brought to."""
    rule = bucket_rule(data)
    if rule is None:
        return f"{data.height} x {data.width} (height x width)"
    return f"{sum(len(rule.sizes(area)) for area in rule.areas)} bucket sizes"


def _train_rounds(experiment: Experiment, train: TrainConfig, data: DataConfig, runtime: Runtime) -> None:
    """One training, or the objective's rounds in a row, each in a folder of its own under the run's."""
    rounds = resolve(train.objective.target, experiment.imports).rounds(train.objective.params)
    if not rounds:
        _train(experiment, train, data, runtime)
        return
    assert experiment.output.dir is not None, "the work sets it"
    root = experiment.output.dir
    folders = [RunFolder(root / stage.name) for stage in rounds]
    begun = from_main([bool(folder.saved()) for folder in folders] if runtime.is_main else None)
    if any(begun) and not experiment.output.resume:
        raise UsageError(
            f"{root} holds rounds already: --resume goes on from there; "
            f"for a new run choose another --output-dir"
        )
    weights = _weights(experiment, train)
    for stage, folder, there in zip(rounds, folders, begun, strict=True):
        log.info("round %s: %d sampling steps", stage.name, stage.steps)
        objective = replace(train.objective, params={**train.objective.params, **stage.params})
        own = replace(train, objective=objective, init_from=weights)
        part = replace(
            experiment,
            train=own,
            output=replace(experiment.output, dir=folder.root, resume=there),
            sampling=replace(experiment.sampling, steps=stage.steps),
        )
        if not _train(part, own, data, runtime):
            return
        runtime.free_memory()
        last = from_main(folder.saved()[-1].path if runtime.is_main else None)
        weights = replace(weights, model=last / NATIVE, allow_missing=[])


def _train(experiment: Experiment, train: TrainConfig, data: DataConfig, runtime: Runtime) -> bool:
    """Build everything and run the loop; whether it came to the last step."""
    folder, saved = _folder(experiment, runtime)
    mesh = Mesh(runtime, **experiment.parallel.sizes)
    sets = open_data(data, runtime, held_out=train.validate_every is not None)
    cached, caches = _cached(experiment, train, data, sets, runtime)
    torch.manual_seed(train.seed)
    engine = build_engine(
        experiment, device=runtime.device, dtype=DTYPES[train.dtype], checkpoint=_weights(experiment, train),
        without=frozenset() if caches is None else caches.spare, mesh=mesh,
    )  # fmt: skip
    objective = _objective(experiment, train, engine, mesh)
    items = cached or in_memory(sets, data, train, engine, objective, runtime)
    place = (train.batch_size, train.seed, mesh.data_rank, mesh.data_ranks)
    loader = Loader(items[0], *place, data.workers, sets.train.groups, pin=runtime.pins)
    trained = TrainEngine(objective, _optimizer(train, objective, experiment), train, runtime, mesh)
    extras = Extras(
        export=exporter(experiment, _weights(experiment, train), engine, objective),
        draw=_pictures(experiment, engine, objective, runtime, mesh, caches),
        tokens=token_counter(engine, objective),
        validation=validation_batches(items[1], *place, sets.held_out.groups) if sets.held_out else [],
    )
    trainer = Trainer(trained, loader, folder, extras)
    if saved:
        trainer.resume(saved[-1])
    elif experiment.output.resume:
        log.warning("%s holds no whole checkpoint: training starts at step 0", folder.root)
    if runtime.is_main:
        _note(experiment, train, engine, runtime, folder)
        trainer.extras.record = _record(experiment, train, folder, trainer.step)
    count = sum(math.prod(shape) for shape in trained.whole_shapes.values())
    log.info(
        "%s: %.2f M trained parameters, %d images an epoch, %d rank%s on %s (%s)",
        type(objective).__name__, count / 1e6, len(sets.train), runtime.world, "s" * (runtime.world > 1),
        runtime.device.type, mesh,
    )  # fmt: skip
    if (
        train.allocator and runtime.device.type == "cpu" and keep_freed_memory()
    ):  # what loading freed has gone
        log.debug("glibc keeps freed memory (train.allocator)")
    barrier(runtime.device)
    try:
        trainer.fit()
    finally:
        if trainer.extras.record is not None:
            trainer.extras.record.close()
    return trainer.step >= train.steps


def _folder(experiment: Experiment, runtime: Runtime) -> tuple[RunFolder, list[Saved]]:
    """The run's folder and its whole checkpoints, oldest first; a folder with some needs ``--resume``."""
    assert experiment.output.dir is not None, "the work sets it"
    folder = RunFolder(experiment.output.dir)
    saved = from_main(folder.saved() if runtime.is_main else None)
    if saved and not experiment.output.resume:
        raise UsageError(
            f"{folder.root} holds checkpoints up to step {saved[-1].step}: --resume goes on from there; "
            f"for a new run choose another --output-dir"
        )
    return folder, saved


def _objective(experiment: Experiment, train: TrainConfig, engine: DiffusionEngine, mesh: Mesh) -> Objective:
    """The objective over ``engine``: with adapters, its tokens shared over ranks, its blocks set up."""
    apply_sequence(engine.network, mesh.sequence)  # before an objective copies the network
    objective: Objective = build(train.objective, imports=experiment.imports, engine=engine)
    if mesh.sequence.size > 1 and "model" not in objective.parts():
        raise UsageError(
            f"parallel.sequence {mesh.sequence.size} shares the network's tokens, and "
            f"{type(objective).__name__} does not train the network: set it to 1"
        )
    _warn_of_random(experiment, train, objective)
    if experiment.adapters.lora is not None:
        add_lora(objective, experiment.adapters.lora, train.seed)
        _pack(train, objective)
    if train.attention == "auto" and next(objective.parameters()).device.type == "cpu":
        log.info("attention: %s", use_kernel(objective, "auto"))  # elsewhere torch chooses
    _run_blocks(train, objective)
    return objective


def _record(experiment: Experiment, train: TrainConfig, folder: RunFolder, step: int) -> Record:
    """Where the run's numbers go: ``metrics.jsonl``, and wandb and tensorboard where asked for."""
    made = Record(folder.root, step=step)
    made.start_wandb(folder.root, train.wandb, train.project, plain(experiment))
    if train.tensorboard:
        made.start_tensorboard(folder.root, step=step)
    return made


def _cached(
    experiment: Experiment, train: TrainConfig, data: DataConfig, sets: DataSets, runtime: Runtime
) -> tuple[list[Items], Caches | None]:
    """The data sets out of the caches of ``data.cache``, now full, and the caches."""
    if data.cache is None:
        return [], None
    caches = Caches(data.cache, experiment, train, _weights(experiment, train), runtime)
    views = [max(1, data.cache_views), 1]
    cached = [caches.over(dataset, count) for dataset, count in zip(sets.both(), views, strict=False)]
    caches.fill(cached, train.batch_size)
    return [*cached], caches


def _weights(experiment: Experiment, train: TrainConfig) -> CheckpointConfig:
    """Where the starting weights come from."""
    return train.init_from or experiment.checkpoint


def _warn_of_random(experiment: Experiment, train: TrainConfig, objective: Objective) -> None:
    """A part that stays as it is should not be random."""
    source, trained = _weights(experiment, train), objective.parts()
    frozen = [part for part in PARTS if part not in trained and source.source(part) is None]
    if "model" in trained and frozen:
        log.warning("%s is frozen at random weights: name it in the checkpoint section", " and ".join(frozen))


def _pack(train: TrainConfig, objective: Objective) -> None:
    """Pack the frozen weights beside low-rank factors (``train.pack``), where that can be; say which."""
    if next(objective.parameters()).device.type != "cpu":
        return
    if reasons := unpacked(train, train.zero):
        log.info("frozen weights are not packed: %s", ", ".join(reasons))
        return
    log.info("%s", pack_frozen(objective.parts()))


def _run_blocks(train: TrainConfig, objective: Objective) -> None:
    """How blocks run: compiled, and recomputed in the backward pass, as the config asks."""
    if train.compile:
        for module in objective.parts().values():
            compiled(module)
    if train.activation_checkpointing:
        _recompute(objective)


def _recompute(objective: Objective) -> None:
    """Have every transformer of the objective recompute its blocks in the backward pass."""
    from sat.transformer import Transformer

    found = [module for module in objective.modules() if isinstance(module, Transformer)]
    for transformer in found:
        transformer.checkpointing = True
    if not found:
        log.warning("train.activation_checkpointing: %s trains no transformer", type(objective).__name__)


def _optimizer(train: TrainConfig, objective: nn.Module, experiment: Experiment) -> Optimizer:
    """``train.optimizer`` over the weight-decay groups."""
    target = resolve(train.optimizer.target, experiment.imports)
    fast = optim.fast_options(target, train.optimizer.params)
    optimizer: Optimizer = build(
        replace(train.optimizer, params={**fast, **train.optimizer.params}),
        imports=experiment.imports,
        params=optim.groups(objective, train.weight_decay),
        lr=train.lr,
    )
    return optimizer


def _pictures(
    experiment: Experiment,
    engine: DiffusionEngine,
    objective: Objective,
    runtime: Runtime,
    mesh: Mesh,
    caches: Caches | None,
) -> Pictures | None:
    """Draws the fixed prompts in between, if that is asked for."""
    if experiment.train is None or experiment.train.sample_every is None:
        return None
    known = None if caches is None else caches.encoded()
    pictures = Pictures(
        experiment, engine, runtime, mesh, learns="text" in objective.parts(), known=known
    )  # fmt: skip
    inputs = InputFolder.of(experiment.sampling, pictures.generator.engine.process.input)
    if inputs is not None:
        pictures.enlarge(inputs)
    return pictures


def _note(
    experiment: Experiment, train: TrainConfig, engine: DiffusionEngine, runtime: Runtime, folder: RunFolder
) -> None:
    """``resolved.yaml`` and ``run.json``; on resuming, what the config changed since."""
    old = folder.root / "resolved.yaml"
    if old.is_file() and (changed := _changes(old.read_text(), dump(experiment))):
        log.info("config changed since this run started: %s", "; ".join(changed[:10]))
    source = _weights(experiment, train)
    paths = {part: source.source(part) for part in PARTS}
    record(
        folder.root,
        experiment,
        hooks=engine.hooks,
        world=runtime.world,
        seeds={"train": train.seed, "sampling": experiment.sampling.seed},
        weights={part: None if path is None else digest(path) for part, path in paths.items()},
        device=str(runtime.device),
    )


def _changes(before: str, after: str) -> list[str]:
    """Lines of a resolved config that are new."""
    known = set(before.splitlines())
    return [line.strip() for line in after.splitlines() if line not in known and "resume:" not in line]
