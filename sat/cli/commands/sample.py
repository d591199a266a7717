"""The work behind ``sample.py``: check the config, load the model once, draw or ask for prompts."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sat.cli.commands.stages import Place, finish, inputs_of, places
from sat.cli.main_guard import Stopped, UsageError
from sat.config.cascade import Cascade, load_cascade
from sat.config.load import dump
from sat.config.record import amend, label, record, weight_digests
from sat.config.schema import Experiment
from sat.config.schema.sampling import parse_share
from sat.config.yaml_source import ConfigError
from sat.errors import LostRankError
from sat.estimate.budget import apply_budget
from sat.parallel.collectives import by_first, lost_rank_message
from sat.parallel.heartbeat import Heartbeat
from sat.parallel.launch import Runtime, keep_freed_memory, launch, pick_device
from sat.parallel.mesh import Mesh
from sat.pipeline import budgeted, input_folder, keep_text_encoder, open_generator
from sat.sampling.generator import Generator, InitialNoise, Run, SamplingParams
from sat.sampling.inputs import checked_latents, read_latents
from sat.sampling.output import OutputFolder, prove_writable
from sat.sampling.prompts import Prompt, check_text, checked_prompts, read_prompt_file, share
from sat.util import log as logs
from sat.util.log import describe

log = logging.getLogger(__name__)


def work(args: argparse.Namespace, settings: Sequence[tuple[str, object]]) -> int:  # noqa: C901 - a run from top to bottom
    """What ``sample.py`` does with parsed arguments; the exit code."""
    logs.setup(debug=args.debug)
    cascade = load_cascade(args.base, [*args.overrides, *settings])
    first = cascade.stages[0].experiment
    if args.print_config:
        _print(cascade)
        return 0
    missing = [problem for stage in cascade.stages for problem in stage.loaded.missing]
    if missing and not args.check:
        raise ConfigError(missing)
    absent = any(problem.key in ("sampling.prompt_file", "sampling.input_dir") for problem in missing)
    prompts = None if absent else _prompts(first)
    if args.check:
        return _check(cascade, prompts)
    for notice in dict.fromkeys(n for stage in cascade.stages for n in stage.loaded.notices):
        log.warning("%s", notice)
    if prompts is None:
        _refuse_to_ask(cascade)
    rewriting = None
    if args.optimize_prompt:
        from sat.cli.commands.prompt import Rewriting

        rewriting = Rewriting(args, first)
    runtime = launch(first.parallel.device, first.parallel.timeout)
    logs.setup(runtime.rank, debug=args.debug)
    heartbeat = Heartbeat(runtime.rank, runtime.world, first.parallel.timeout)
    try:
        ranks = _Ranks(runtime, _mesh(cascade, runtime), heartbeat)
        if prompts is None:
            session = _open(Place.alone(keep_text_encoder(first)), ranks, 1)
            _ask(session, str.strip if rewriting is None else lambda text: rewriting.texts([text])[0])
        else:
            if rewriting is not None:
                cascade, prompts = rewriting.whole(cascade, prompts, runtime)
            _draw_all(cascade, prompts, ranks)
        heartbeat.finish()
    except LostRankError:
        raise
    except BaseException as error:
        if (lost := lost_rank_message(error)) is not None:  # while this team exchanged something
            heartbeat.abort(lost)
        heartbeat.fail(describe(error))
        raise
    finally:
        runtime.close()
    return 0


@dataclass(frozen=True)
class _Ranks:
    """This process among the others."""

    runtime: Runtime
    mesh: Mesh
    heartbeat: Heartbeat


def _mesh(cascade: Cascade, runtime: Runtime) -> Mesh:
    """The layout of the ranks, the same for all stages of a run."""
    layouts = [stage.experiment.parallel.sizes for stage in cascade.stages]
    for stage, layout in zip(cascade.stages, layouts, strict=True):
        if layout != layouts[0]:
            raise UsageError(
                f"stage {stage.name}: parallel {layout} is not that of the first stage, {layouts[0]}: the "
                f"ranks of a run are laid out once"
            )
    return Mesh(runtime, **layouts[0])


@dataclass(frozen=True)
class _Session:
    """A loaded model, its output folder, and a run over them."""

    run: Run
    folder: OutputFolder
    runtime: Runtime
    resume: bool
    records: Path


def _draw_all(cascade: Cascade, prompts: Sequence[Prompt], ranks: _Ranks) -> None:
    """Draw ``prompts`` stage by stage; each stage's weights are there only while it draws."""
    stages, runtime, mesh = places(cascade), ranks.runtime, ranks.mesh
    mine = share(_wanted(stages[0].experiment, prompts), mesh.data_rank, mesh.data_ranks)
    inputs = inputs_of(stages[0].experiment)
    if inputs is not None and mesh.leads:  # before anything is loaded
        inputs.check(mine)
    if len(stages) > 1 and stages[-1].experiment.output.resume:
        final = stages[-1]
        done = OutputFolder(final.pictures, label(final.experiment), final.experiment.sampling.batch_size)
        mine = by_first(mesh.team, lambda: [prompt for prompt in mine if not done.finished(prompt)])
    for number, place in enumerate(stages):
        if len(stages) > 1 and runtime.is_main:
            log.info("stage %d of %d: %s", number + 1, len(stages), place.records.name)
        result = number + 1 == len(stages)
        _draw(_open(place, ranks, len(prompts)), prompts, mine, result=result)
        runtime.free_memory()
    if len(stages) > 1:
        finish(cascade, stages, mine if mesh.leads else [], runtime)


def _prompts(experiment: Experiment) -> list[Prompt] | None:
    """The prompts that the config gives; None when it gives none and they are to be asked for."""
    sampling = experiment.sampling
    check_text(sampling.negative_prompt, "the negative prompt")
    if sampling.prompt_file is not None:
        return checked_prompts(read_prompt_file(sampling.prompt_file))
    if sampling.prompt is None:
        inputs = None if sampling.input_dir is None else inputs_of(experiment)
        return None if inputs is None else inputs.prompts()
    prompts = checked_prompts([sampling.prompt] if isinstance(sampling.prompt, str) else sampling.prompt)
    if not prompts:
        raise UsageError("sampling.prompt is an empty list: give at least one prompt")
    return prompts


def _wanted(experiment: Experiment, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those of ``prompts`` that this run draws: ``sampling.share``, else all."""
    return share(prompts, *parse_share(experiment.sampling.share or "0/1"))


def _check(cascade: Cascade, prompts: Sequence[Prompt] | None) -> int:
    """Say that the config is good, and what it still needs."""
    lines = [str(n) for stage in cascade.stages for n in (*stage.loaded.notices, *stage.loaded.missing)]
    for line in dict.fromkeys(lines):
        print(f"note: {line}")
    count = "no prompts yet" if prompts is None else _count(cascade.stages[0].experiment, prompts)
    for stage in cascade.stages:
        sampling = stage.experiment.sampling
        name = f"{stage.name}: " if stage.name else ""
        print(
            f"config ok: {name}{count}, {sampling.batch_size} x {sampling.height} x {sampling.width} "
            f"(images x height x width), {sampling.steps} step{'s' * (sampling.steps != 1)}, {sampling.dtype}"
        )
        picked = apply_budget(stage.experiment, pick_device(stage.experiment.parallel.device))
        if picked is not None:
            print(f"{name}{picked}")
    return 0


def _count(experiment: Experiment, prompts: Sequence[Prompt]) -> str:
    """How many prompts are drawn and, of a share, out of how many."""
    whole = f"{len(prompts)} prompt{'s' * (len(prompts) != 1)}"
    if experiment.sampling.share is None:
        return whole
    return f"{len(_wanted(experiment, prompts))} of {whole}"


def _print(cascade: Cascade) -> None:
    """The resolved config; of a cascade, one YAML document a stage."""
    for number, stage in enumerate(cascade.stages):
        if stage.name:
            print(f"{'---' + chr(10) if number else ''}# stage {stage.name}")
        print(dump(stage.experiment), end="")


def _refuse_to_ask(cascade: Cascade) -> None:
    """An error unless there is somebody to ask for prompts, and one model to draw them."""
    if len(cascade.stages) > 1:
        raise UsageError("a cascade loads its stages one after the other: give --prompt or --prompt-file")
    if cascade.stages[0].experiment.sampling.share is not None:
        raise UsageError("sampling.share is a share of given prompts: give --prompt-file")
    if not sys.stdin.isatty():
        raise UsageError(
            "no prompt: give --prompt or --prompt-file, or run on a terminal to be asked for prompts"
        )


def _open(place: Place, ranks: _Ranks, prompts: int) -> _Session:
    """Prove that the output folder can be written, load the model, write the records."""
    started = time.monotonic()
    runtime, mesh = ranks.runtime, ranks.mesh
    experiment = budgeted(place.experiment, runtime.device)
    sampling = experiment.sampling
    given = None if sampling.latents is None else read_latents(sampling.latents)
    if mesh.leads:
        prove_writable(place.pictures)
    generator, guider = open_generator(experiment, runtime.device, mesh)
    if runtime.device.type == "cpu" and experiment.memory.budget is None:
        keep_freed_memory()  # every step asks for the same large buffers; those of loading have gone by now
    params = SamplingParams(sampling.height, sampling.width, sampling.steps, guider, sampling.tile)
    shape = generator.engine.latent_shape(params.height, params.width)
    if given is not None:
        given = checked_latents(given, shape, prompts, sampling.batch_size)
    noise = InitialNoise(sampling.seed, shape, sampling.batch_size, given)
    about = label(experiment, given)
    folder = OutputFolder(place.pictures, about, sampling.batch_size, sampling.grid_columns)
    if runtime.is_main:
        _record(experiment, generator, place, runtime)
        seconds = time.monotonic() - started
        log.info("loaded in %.1f s on %s (%s); %s", seconds, runtime.device, mesh, generator.speed)
    run = Run(
        generator, params, noise, folder, sampling.negative_prompt, runtime.rank, ranks.heartbeat.beat,
        input_folder(sampling, generator.engine.process.input),
    )  # fmt: skip
    return _Session(run, folder, runtime, experiment.output.resume, place.records)


def _record(experiment: Experiment, generator: Generator, place: Place, runtime: Runtime) -> None:
    """``resolved.yaml`` and ``run.json``; the config is a fresh, whole run's: it draws everything again."""
    sampling = replace(experiment.sampling, share=None)
    output = replace(experiment.output, dir=place.pictures, resume=False)
    fresh = replace(experiment, sampling=sampling, output=output)
    record(
        place.records,
        fresh,
        hooks=generator.engine.hooks,
        world=runtime.world,
        seeds={"sampling": experiment.sampling.seed},
        weights=weight_digests(experiment),
        device=str(runtime.device),
    )


def _tell_reuse(session: _Session) -> None:
    """How often the step cache spared the network, in the log and in ``run.json``."""
    count = session.run.generator.count
    log.info("step cache: %d of %d looks at the network were computed", count.computed, count.looks)
    amend(session.records, {"step_cache": asdict(count)})


def _draw(session: _Session, prompts: Sequence[Prompt], mine: Sequence[Prompt], *, result: bool) -> None:
    """Draw this rank's share ``mine`` of ``prompts`` and, for a ``result``, say where the pictures are."""
    main, started = session.runtime.is_main, time.monotonic()
    if main and (others := session.folder.strangers(prompts)):
        log.warning(
            "%s holds %d prompt folders of another run, such as %s",
            session.folder.root,
            len(others),
            others[0],
        )
    report = session.run(mine, resume=session.resume)
    if main and session.run.generator.cache is not None:
        _tell_reuse(session)
    if not main or not result:
        return
    count, seconds = len(report.written), time.monotonic() - started
    log.info("%d file%s written in %.1f s", count, "s" * (count != 1), seconds)
    if len(prompts) == 1:
        for path in report.written or [session.folder.folder(prompts[0])]:
            print(path)
    else:
        print(session.folder.root)


def _ask(session: _Session, rewrite: Callable[[str], str]) -> None:
    """Ask for prompts until end of file; each is rewritten and gets the next free number."""
    if session.runtime.world > 1:
        raise UsageError(
            "asking for prompts works in one process: give --prompt or --prompt-file, or run one"
        )
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - line editing and history for input()
    print("A prompt a line; Ctrl-D ends.", file=sys.stderr)
    while (text := _question()) is not None:
        if not text.strip():
            continue
        try:
            check_text(text, "the prompt")
            prompt = Prompt(session.folder.next_index(), rewrite(text))
            for path in session.run([prompt]).written:
                print(path)
        except Stopped:
            raise
        except KeyboardInterrupt:
            print("\nstopped; the next prompt?", file=sys.stderr)
        except (ValueError, ArithmeticError, OSError) as error:
            print(f"error: {describe(error)}", file=sys.stderr)


def _question() -> str | None:
    """One line from the terminal; None at its end or on Ctrl-C."""
    try:
        return input("prompt> ")
    except Stopped:
        raise
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
