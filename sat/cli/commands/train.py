"""Work of ``train.py``: check the config, build everything it names, and run the loop."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from sat.checkpoint.format import DTYPES, PARTS
from sat.checkpoint.formats import digest
from sat.checkpoint.verify import Verify
from sat.cli.arguments import spoken
from sat.cli.main_guard import UsageError
from sat.config.build import build_engine
from sat.config.check import build, resolve
from sat.config.load import dump, load_full
from sat.config.record import record
from sat.config.schema import CheckpointConfig, DataConfig, Experiment, TrainConfig, plain
from sat.config.settle import as_recorded, settle_dtype, settle_training, tell_slow
from sat.config.yaml_source import ConfigError, Problem
from sat.data.dataset import Items
from sat.data.loader import Loader, validation_batches
from sat.engine import DiffusionEngine
from sat.kernels.apply import compiled, use_kernel
from sat.kernels.compile import recompute
from sat.parallel.collectives import barrier, from_main
from sat.parallel.heartbeat import current
from sat.parallel.launch import Mesh, Runtime, be_patient, keep_freed_memory, launch, ranks_together
from sat.parallel.sequence import apply_sequence
from sat.sampling.generator import SteeringPictures
from sat.sampling.inputs import InputFolder
from sat.train.backend import build_backend, check_backend
from sat.train.checkpoints import exporter
from sat.train.data import Caches, bucket_rule, check_words, in_memory, made_extras, open_data
from sat.train.deepspeed import check_dtype
from sat.train.log import Record, token_counter
from sat.train.loop import Extras, Trainer
from sat.train.lora import NAME as TRAINED
from sat.train.lora import add_lora, add_tokens, pack_frozen, unpacked
from sat.train.measure import check_groups, largest_size
from sat.train.objectives import Objective
from sat.train.optim import build_optimizer, by_role, groups
from sat.train.pictures import Pictures
from sat.train.resume import NATIVE, RunFolder
from sat.util import log as logs
from sat.util.ending import ENDED, STOPPED_EARLY, ending
from sat.util.host import install
from sat.util.lock import BusyError, Lock

log = logging.getLogger(__name__)

LOCK = ".writer.lock"
"""Lock file of a run folder."""


def work(args: argparse.Namespace, settings: Sequence[tuple[str, object]]) -> int:  # noqa: C901 - in order
    """Check, estimate or train, as the parsed arguments ask; the exit code."""
    logs.setup(debug=args.debug, verbosity=args.verbosity)
    loaded = load_full(args.base, [*args.overrides, *settings], samples=False)
    experiment = loaded.experiment
    folder = experiment.output.dir or Path("runs") / Path(args.base[-1]).stem  # named after the last file
    experiment = replace(experiment, output=replace(experiment.output, dir=folder))
    if args.print_config:
        print(dump(experiment), end="")
        return 0
    train, data = _sections(experiment)
    check_groups(experiment)
    if args.check_inputs and loaded.missing:
        raise ConfigError(loaded.missing)
    if args.check or args.check_inputs:
        for note in [*loaded.notices, *map(str, loaded.missing)]:
            print(f"note: {note}")
        precision = train.dtype if train.autocast is None else f"{train.dtype} with {train.autocast} autocast"
        sizes = f"{data.height} x {data.width} (height x width)"
        if (rule := bucket_rule(data)) is not None:
            sizes = f"{sum(len(rule.sizes(area)) for area in rule.areas)} bucket sizes"
        print(
            f"config ok: {train.steps} steps of {train.batch_size} x {train.accumulate} images a data rank "
            f"at {sizes}, {precision}, ZeRO {train.zero}"
        )
        if args.check_inputs:
            print(f"its end: {folder / ENDED}\nrun folder: {folder}")
        return 0
    if args.plan:
        from sat.cli.commands.estimate import estimate

        estimate(experiment, args.ranks, args.fit)
        return 0
    if loaded.missing:
        raise ConfigError(loaded.missing)

    parallel = experiment.parallel
    runtime = launch(parallel.device, parallel.timeout, parallel.stall, group=True)
    logs.setup(runtime.rank, debug=args.debug, verbosity=args.verbosity)
    for notice in loaded.notices:
        log.warning("%s", notice)
    with ranks_together(runtime):
        if experiment.output.resume:  # what was chosen for this run stands, of its first round if it has some
            for file in [folder / "resolved.yaml", *sorted(folder.glob("*/resolved.yaml"))]:
                experiment = as_recorded(experiment, file)
        experiment = settle_dtype(experiment, runtime.device, main=runtime.is_main)
        train, data = _sections(experiment)
        advice = "train.dtype=fp32" if train.autocast is None else "train.autocast=null"
        tell_slow(train.autocast or train.dtype, advice, runtime.device)
        check_backend(train, runtime.world)
        check_dtype(train, runtime)
        with _writer(folder, runtime):
            whole = _train_rounds(experiment, train, data, runtime)
            runtime.finish()
        if whole and runtime.is_main:
            kind, params = resolve(train.objective.target, experiment.imports), train.objective.params
            done = folder / rounds[-1].name if (rounds := kind.rounds(params)) else folder
            uses = f"--lora {done}" if experiment.adapters.lora is not None else f"checkpoint.path={done}"
            if "model" in kind.needs(params):
                what = f"python sample.py --base {args.base[0]} {uses} --prompt ..."
                log.info("next: %s", spoken(what))
    return 0 if whole else STOPPED_EARLY


@contextmanager
def _writer(root: Path, runtime: Runtime) -> Iterator[None]:
    """Be the one writer of the run folder; rank 0 is for all, and its refusal is that of all."""
    with ExitStack() as stack:
        refused: Exception | None = None
        try:
            if runtime.is_main:
                root.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(Lock(root / LOCK, str(root)))
                ending.own(root)
                ending.lock = lock
        except BusyError as error:
            refused = error
        if (refusal := from_main(refused)) is not None:
            raise refusal
        ending.folder, ending.again = root, lambda: _again(root)
        yield


def _again(root: Path) -> str:
    """Advice to go on after an interruption: from the newest checkpoint, if there is any."""
    steps = [saved.step for place in (root, *root.iterdir()) for saved in RunFolder(place).saved()]
    if not steps:
        return "there is no checkpoint yet: the same command starts from the beginning"
    return "run the same command with --resume to go on from the last checkpoint"


def _sections(experiment: Experiment) -> tuple[TrainConfig, DataConfig]:
    """The sections ``train`` and ``data``; raises for settings that no training can follow."""
    train, data = experiment.train, experiment.data
    if train is None or data is None:
        name = "train" if train is None else "data"
        raise UsageError(
            f"the config has no `{name}` section: lay a training config over it, such as configs/sft.yaml"
        )
    if experiment.parallel.guidance > 1:
        raise UsageError(
            f"parallel.guidance {experiment.parallel.guidance} shares the two halves of guidance, and a "
            f"training step has one: set it to 1, and its ranks read other images"
        )
    if train.tensorboard and find_spec("tensorboard") is None:
        raise UsageError(f"train.tensorboard needs a package: {install('tensorboard')}, or set it to false")
    control, tokens = experiment.adapters.control, experiment.adapters.tokens
    if experiment.adapters.lora is None and not tokens and (control is None or not control.train):
        params, integers = train.objective.params, experiment.memory.quantize
        needs = resolve(train.objective.target, experiment.imports).needs(params)
        trained = {"network": "model" in needs, "text_encoder": bool(params.get("train_text"))}
        if broken := [name for name, trains in trained.items() if trains and getattr(integers, name)]:
            what = (
                "its weights are trained, which needs them plain: set it to null, or train low-rank factors "
                "beside them (configs/lora.yaml)"
            )
            raise ConfigError([Problem("memory.quantize", name, what) for name in broken])
    return train, data


def _train_rounds(experiment: Experiment, train: TrainConfig, data: DataConfig, runtime: Runtime) -> bool:
    """Train once, or the objective's rounds in a row, each in a folder of its own under the run's.

    True if the last step was done.
    """
    weights, lora = train.init_from or experiment.checkpoint, experiment.adapters.lora
    rounds = resolve(train.objective.target, experiment.imports).rounds(train.objective.params)
    if not rounds:
        return _train(experiment, train, data, weights, runtime)
    assert experiment.output.dir is not None, "the work sets it"
    root = experiment.output.dir
    folders = [RunFolder(root / stage.name) for stage in rounds]
    begun = from_main([bool(folder.saved()) for folder in folders] if runtime.is_main else None)
    if any(begun) and not experiment.output.resume:
        raise UsageError(
            f"{root} holds rounds already: --resume goes on from there; "
            f"for a new run choose another --output-dir"
        )
    for stage, folder, there in zip(rounds, folders, begun, strict=True):
        log.info("round %s: %d sampling steps", stage.name, stage.steps)
        objective = replace(train.objective, params={**train.objective.params, **stage.params})
        own = replace(train, objective=objective, init_from=weights)
        part = replace(
            experiment,
            train=own,
            adapters=replace(experiment.adapters, lora=lora),
            output=replace(experiment.output, dir=folder.root, resume=there),
            sampling=replace(experiment.sampling, steps=stage.steps),
        )
        if not _train(part, own, data, weights, runtime):
            return False
        runtime.free_memory()
        last = from_main(folder.saved()[-1].path if runtime.is_main else None)
        if lora is None:
            weights = replace(weights, model=last / NATIVE, allow_missing=[])
        else:
            lora = replace(lora, start=last / NATIVE)
    return True


def _train(
    experiment: Experiment, train: TrainConfig, data: DataConfig, weights: CheckpointConfig, runtime: Runtime
) -> bool:
    """Build everything and run the loop; true if it came to the last step."""
    assert experiment.output.dir is not None, "the work sets it"
    current().starting()
    folder, mesh = RunFolder(experiment.output.dir), Mesh(runtime, **experiment.parallel.sizes)
    saved = from_main(folder.saved() if runtime.is_main else None)
    if saved and not experiment.output.resume:
        raise UsageError(
            f"{folder.root} holds checkpoints up to step {saved[-1].step}: --resume goes on from there; "
            f"for a new run choose another --output-dir"
        )

    # Data: images, or encodings out of full caches, which need fewer parts of the engine.
    sets = open_data(data, runtime, held_out=train.validate_every is not None, made=made_extras(experiment))
    check_words(experiment.adapters.tokens, sets.train)
    caches, items = None, list[Items]()
    if data.cache is not None:
        caches = Caches(data.cache, experiment, train, weights, runtime)
        views = (max(1, data.cache_views), 1)
        cached = [caches.over(dataset, count) for dataset, count in zip(sets.both(), views, strict=False)]
        caches.fill(cached, train.batch_size)
        items = [*cached]

    # The model, its objective and its optimizer.
    torch.manual_seed(train.seed)
    engine = build_engine(
        experiment, device=runtime.device, dtype=DTYPES[train.dtype], checkpoint=weights,
        without=frozenset() if caches is None else caches.spare, mesh=mesh,
    )  # fmt: skip
    packs = experiment.adapters.lora is not None and not unpacked(train, train.zero)
    cells = engine.latent_shape(*largest_size(data))[1:]
    train = settle_training(
        train, engine.network, (cells[0], cells[1]), runtime.device, packs=packs, main=runtime.is_main
    )
    experiment = replace(experiment, train=train)
    engine.conditioner.empty_text = None if caches is None else caches.empty()
    objective = _objective(experiment, train, weights, engine, mesh)
    items = items or in_memory(sets, data, train, engine, objective, runtime)
    place = (train.batch_size, train.seed, mesh.data_rank, mesh.data_ranks)
    loader = Loader(items[0], *place, data.workers, sets.train.groups, pin=runtime.pins)
    own = by_role(objective, groups(objective, train.weight_decay, train.groups, train.lr))
    optimizer = build_optimizer(train, experiment.imports, own)
    trained = build_backend(objective, optimizer, train, runtime, mesh, experiment.imports)

    # Work beside training: exports, samples of the fixed prompts, validation, the record.
    export, samples = exporter(experiment, weights, engine, objective), None
    if train.sample_every is not None:
        learns, known = "text" in objective.parts(), None if caches is None else caches.encoded()
        samples = Pictures(experiment, engine, runtime, mesh, learns=learns, known=known)
        if (inputs := InputFolder.of(experiment.sampling, engine.process.input)) is not None:
            samples.enlarge(inputs)
        samples.controls = _steering(experiment, objective)
    held = sets.held_out
    held_out = validation_batches(items[1], *place, held.groups, pin=runtime.pins) if held else []
    extras = Extras(export, samples, token_counter(engine, objective), held_out)
    trainer = Trainer(trained, loader, folder, extras)
    if saved:
        trainer.resume(saved[-1])
    elif experiment.output.resume:
        log.warning("%s holds no whole checkpoint: training starts at step 0", folder.root)
    if runtime.is_main:
        extras.record = _record(experiment, train, weights, engine, runtime, trainer)
    be_patient()  # DeepSpeed has made groups
    log.info(
        "%s: %.2f M trained parameters, %d images an epoch, on %s%s", type(objective).__name__,
        sum(map(math.prod, trained.whole_shapes.values())) / 1e6, len(sets.train), runtime.device.type,
        f", {runtime.world} ranks ({mesh})" if runtime.world > 1 else "",
    )  # fmt: skip
    if train.allocator and runtime.device.type == "cpu" and keep_freed_memory():  # after loading's own
        log.debug("glibc keeps freed memory (train.allocator)")
    barrier(runtime.device)
    try:
        trainer.fit()
    finally:
        if extras.record is not None:
            with current().long("closing the record"):
                extras.record.close()
    return trainer.done


def _steering(experiment: Experiment, objective: Objective) -> SteeringPictures | None:
    """The control's pictures for the samples in between; None without any."""
    if experiment.adapters.control is None:
        return None
    from sat.train.control import SamplePictures

    return SamplePictures.of(objective, experiment)


def _objective(
    experiment: Experiment, train: TrainConfig, weights: CheckpointConfig, engine: DiffusionEngine, mesh: Mesh
) -> Objective:
    """The objective over ``engine``, with all that is put on its modules from outside."""
    apply_sequence(engine.network, mesh.sequence)  # before an objective copies the network
    objective: Objective = build(train.objective, imports=experiment.imports, engine=engine)
    name, trained = type(objective).__name__, objective.parts()
    on_cpu = next(objective.parameters()).device.type == "cpu"
    if mesh.sequence.size > 1 and "model" not in trained:
        raise UsageError(
            f"parallel.sequence {mesh.sequence.size} shares the network's tokens, and "
            f"{name} does not train the network: set it to 1"
        )
    frozen = [part for part in PARTS if part not in trained and weights.source(part) is None]
    if "model" in trained and frozen:
        are, them = ("is", "it") if len(frozen) == 1 else ("are", "them")
        what = " and ".join(frozen)
        log.warning("%s %s frozen at random weights: name %s in the checkpoint section", what, are, them)
    if experiment.adapters.lora is not None:
        add_lora(objective, experiment.adapters.lora, train.seed, Verify(weights.verify))
    if experiment.adapters.control is not None:  # behind LoRA, whose patterns would name its layers too
        from sat.train.control import add_control

        add_control(objective, experiment, train, mesh.tensor, mesh.sequence)
    objective.begin(None if experiment.adapters.lora is None else TRAINED)
    if experiment.adapters.lora is not None and on_cpu:
        reasons = unpacked(train, train.zero)
        done = f"frozen weights are not packed: {', '.join(reasons)}" if reasons else pack_frozen(trained)
        log.debug("%s", done)
    if words := experiment.adapters.tokens:
        alone = experiment.adapters.lora is None
        add_tokens(objective, engine.conditioner, words, train.seed, alone=alone)
    if on_cpu or train.attention != "auto":  # elsewhere torch chooses
        log.debug("attention: %s", use_kernel(objective, train.attention, section="train"))
    for module in trained.values() if train.compile else []:
        compiled(module)
    if train.activation_checkpointing and not recompute(objective):
        log.warning("train.activation_checkpointing: %s trains no transformer", name)
    return objective


def _record(
    experiment: Experiment,
    train: TrainConfig,
    weights: CheckpointConfig,
    engine: DiffusionEngine,
    runtime: Runtime,
    trainer: Trainer,
) -> Record:
    """Write ``resolved.yaml`` and ``run.json``, and open the record of metrics; on rank 0."""
    root = trainer.folder.root
    if (old := root / "resolved.yaml").is_file():  # a resumed run says what its config changes
        known = set(old.read_text().splitlines())
        lines = [line for line in dump(experiment).splitlines() if line not in known]
        if changed := [line.strip() for line in lines if "resume:" not in line]:
            log.info("config changed since this run started: %s", "; ".join(changed[:10]))
    paths = {part: weights.source(part) for part in PARTS}
    record(
        root,
        experiment,
        hooks=engine.hooks,
        world=runtime.world,
        seeds={"train": train.seed, "sampling": experiment.sampling.seed},
        weights={part: None if path is None else digest(path) for part, path in paths.items()},
        device=str(runtime.device),
    )
    metrics = Record(root, step=trainer.step)
    metrics.start_wandb(root, train, plain(experiment), resume=experiment.output.resume)
    if train.tensorboard:
        metrics.start_tensorboard(root, step=trainer.step, train=train, config=dump(experiment))
    return metrics
