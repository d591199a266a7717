"""The work of ``sample.py``: check the config, load the model once, draw or ask for prompts."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sat.cli.main_guard import Stopped, UsageError
from sat.config.build import components
from sat.config.cascade import Cascade, dump_cascade, load_cascade
from sat.config.load import dump
from sat.config.record import Label, amend, label, record, settings_digest, weight_digests
from sat.config.schema import Experiment, RuleError, SamplingConfig
from sat.config.schema.base import parse_share
from sat.config.settle import as_recorded, settle_dtype
from sat.config.yaml_source import ConfigError
from sat.diffusion.guidance import Embedded, Unguided
from sat.estimate.budget import apply_budget
from sat.parallel.collectives import by_first, from_main
from sat.parallel.heartbeat import current
from sat.parallel.launch import Mesh, Runtime, keep_freed_memory, launch, pick_device, ranks_together
from sat.pipeline import Pipeline, StageLoader, keep_text_encoder
from sat.sampling.generator import SamplingParams, strength
from sat.sampling.inputs import InputFolder, PictureFiles, checked_latents, read_latents
from sat.sampling.output import BEGAN, STAGES, OutputFolder, folder_name, prove_writable, run_folder
from sat.sampling.prompts import (
    NO_ROW,
    Prompt,
    check_text,
    checked_prompts,
    read_prompt_file,
    read_prompt_rows,
)
from sat.util import log as logs
from sat.util.ending import ended_name, ending
from sat.util.host import write_text
from sat.util.lock import BusyError, share_lock
from sat.util.log import describe

if TYPE_CHECKING:
    from sat.sampling.edit import EditInput

log = logging.getLogger(__name__)

OUTPUT = Path("outputs")
"""Folder for pictures when ``output.dir`` is null."""


def work(args: argparse.Namespace, settings: Sequence[tuple[str, object]]) -> int:  # noqa: C901 - top to bottom
    """Check the config of ``sample.py``, then draw its prompts or ask for some; the exit code."""
    logs.setup(debug=args.debug, verbosity=args.verbosity)
    cascade = load_cascade(args.base, [*args.overrides, *settings])
    first = cascade.stages[0].experiment
    if args.print_config:
        for number, stage in enumerate(cascade.stages):  # of a cascade, one YAML document a stage
            if stage.name:
                print(f"{'---' + chr(10) if number else ''}# stage {stage.name}")
            print(dump(stage.experiment), end="")
        return 0
    missing = [problem for stage in cascade.stages for problem in stage.missing]
    if missing and not args.check:
        raise ConfigError(missing)
    absent = any(problem.key in ("sampling.prompt_file", "sampling.input_dir") for problem in missing)
    prompts = None if absent else given_prompts(first)
    if args.check or args.check_inputs:
        _check(cascade, prompts)
        edits = None if missing else _edits(first, prompts or ())
        if edits is not None and args.check_inputs and prompts is not None:
            edits.check(_wanted(first, prompts), first.sampling.batch_size)
        if args.check_inputs:
            part = parse_share(first.sampling.share or "0/1")
            placed = _placed(cascade, prompts, overwrite=args.overwrite)
            root = placed.stages[-1].experiment.output.dir or OUTPUT
            print(f"its end: {root / ended_name(*part)}\nrun folder: {root}")
        return 0
    _warn(cascade, prompts or ())
    if prompts is None and len(cascade.stages) > 1:
        raise UsageError("a cascade loads its stages one after the other: give --prompt or --prompt-file")
    if prompts is None and first.sampling.share is not None:
        raise UsageError("sampling.share is a share of given prompts: give --prompt-file")
    if prompts is None and not sys.stdin.isatty():
        raise UsageError(
            "no prompt: give --prompt or --prompt-file, or run on a terminal to be asked for prompts"
        )
    if args.grid:
        from sat.cli.commands.plot import grid

        if prompts is None or len(cascade.stages) > 1 or first.sampling.share is not None:
            raise UsageError("--grid draws given prompts with one model in one process")
        return grid(args, settings, prompts)
    layout = first.parallel.sizes
    for stage in cascade.stages:
        if stage.experiment.parallel.sizes != layout:
            raise UsageError(
                f"stage {stage.name}: parallel {stage.experiment.parallel.sizes} is not that of the first "
                f"stage, {layout}: the ranks of a run are laid out once"
            )
    rewriting = None
    if args.optimize_prompt:
        from sat.cli.commands.prompt import Rewriting

        if any(prompt.row != NO_ROW for prompt in prompts or ()):
            raise UsageError("--optimize-prompt is for plain prompts: rewrite those of a .jsonl file before")
        rewriting = Rewriting(args, first)
    runtime = launch(first.parallel.device, first.parallel.timeout, first.parallel.stall)
    if runtime.rank:
        logs.setup(runtime.rank, debug=args.debug, verbosity=args.verbosity)
    with ranks_together(runtime):
        ranks = _Ranks(runtime, Mesh(runtime, **layout))
        if rewriting is not None and prompts is not None:
            cascade, prompts = rewriting.whole(cascade, prompts, runtime)
        placed = _placed(cascade, prompts, overwrite=args.overwrite) if runtime.is_main else cascade
        cascade = from_main(placed)
        with _writer(cascade, prompts, runtime):
            if prompts is None:
                root = first.output.dir or OUTPUT
                place = _Place(keep_text_encoder(first), root, root, _edits(first, ()))
                session = _open(place, ranks, 1)
                _ask(session, str.strip if rewriting is None else lambda text: rewriting.texts([text])[0])
            else:
                _draw_all(cascade, prompts, ranks)
            runtime.finish()
    return 0


def _warn(cascade: Cascade, prompts: Sequence[Prompt]) -> None:
    """Log what is legal and perhaps not meant: old keys, empty prompts, negative guidance."""
    for notice in dict.fromkeys(n for stage in cascade.stages for n in stage.notices):
        log.warning("%s", notice)
    for prompt in prompts:
        if not prompt.text.strip():
            log.warning("prompt %d is empty: its pictures are drawn without one", prompt.index)
    sampling = cascade.stages[0].experiment.sampling
    guider = components(cascade.stages[0].experiment).guider
    scale = strength(guider)
    if scale is not None and scale < 0:
        log.warning("guidance %g draws away from the prompt: 1 is none, usual are 2 to 8", scale)
    against = sampling.negative_prompt or any(prompt.row.own("negative_prompt") for prompt in prompts)
    if against and (isinstance(guider, (Embedded, Unguided)) or scale == 1):
        log.warning("the negative prompt has no effect: this run guides by no second evaluation (--guidance)")


def _placed(cascade: Cascade, prompts: Sequence[Prompt] | None, *, overwrite: bool) -> Cascade:
    """``cascade`` with the folder that its pictures go to: no fresh run replaces the pictures of another.

    With --resume, as a share or as a job that was queued again it goes on where it began, and skips what is
    finished. Prompts that are asked for get the next free numbers of the folder instead.
    """
    last = cascade.stages[-1].experiment
    root, resume = last.output.dir or OUTPUT, last.output.resume
    if overwrite and resume:
        raise UsageError("--overwrite draws all again, --resume what is missing: give one of them")
    if prompts is not None and not overwrite:
        again = resume or last.sampling.share is not None or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        folder, begun = run_folder(root, _purpose(cascade, prompts), join=again)
        if begun or not resume:
            if folder != root:
                how = "goes on in" if begun else "goes to"
                advice = "" if begun else " (--overwrite replaces them)"
                log.info("%s holds pictures of another run, so this one %s %s%s", root, how, folder, advice)
            root, resume = folder, resume or begun
    output = replace(last.output, dir=root, resume=resume)
    stages = [replace(s, experiment=replace(s.experiment, output=output)) for s in cascade.stages]
    return Cascade(stages, cascade.keep)


def _purpose(cascade: Cascade, prompts: Sequence[Prompt] | None) -> str:
    """Digest of configs and prompts, the same for every share and wherever the pictures go."""
    trees = []
    for stage in cascade.stages:
        sampling = replace(stage.experiment.sampling, share=None)
        output = replace(stage.experiment.output, dir=None, resume=False)
        trees.append(dump(replace(stage.experiment, sampling=sampling, output=output)))
    texts = [
        [prompt.index, prompt.text, *([str(prompt.row)] if prompt.row != NO_ROW else [])]
        for prompt in prompts or ()
    ]
    return settings_digest({"config": trees, "prompts": None if prompts is None else texts})


@contextlib.contextmanager
def _writer(cascade: Cascade, prompts: Sequence[Prompt] | None, runtime: Runtime) -> Iterator[None]:
    """Be the one writer of this share of the output folder; rank 0 is for all, and its refusal is theirs."""
    last = cascade.stages[-1].experiment
    root, part = last.output.dir or OUTPUT, parse_share(last.sampling.share or "0/1")
    with contextlib.ExitStack() as stack:
        refused: Exception | None = None
        try:
            if runtime.is_main:
                prove_writable(root)
                purpose = _purpose(cascade, prompts)
                ending.lock = stack.enter_context(share_lock(root, *part, purpose, str(root)))
                write_text(root / BEGAN, json.dumps({"purpose": purpose}) + "\n")
        except BusyError as error:
            refused = error
        if (refusal := from_main(refused)) is not None:
            raise refusal
        if prompts is not None:
            ending.again = lambda: "run the same command with --resume to draw the rest"
        ending.own(root, *part)
        yield


def given_prompts(experiment: Experiment) -> list[Prompt] | None:
    """The prompts that the config gives; None when it gives none and they are to be asked for."""
    sampling = experiment.sampling
    check_text(sampling.negative_prompt, "the negative prompt")
    if sampling.prompt_file is not None:
        if sampling.prompt_file.suffix.lower() != ".jsonl":
            return _one_a_picture(sampling, checked_prompts(read_prompt_file(sampling.prompt_file)))
        rows, strange = read_prompt_rows(sampling.prompt_file)
        if strange:
            log.warning("%s: keys without a meaning here: %s", sampling.prompt_file, ", ".join(strange))
        check_rows(sampling, rows)
        return rows
    if sampling.prompt is None:
        inputs = None if sampling.input_dir is None else _inputs(experiment)
        return None if inputs is None else inputs.prompts()
    prompts = checked_prompts([sampling.prompt] if isinstance(sampling.prompt, str) else sampling.prompt)
    if not prompts:
        raise UsageError("sampling.prompt is an empty list: give at least one prompt")
    return _one_a_picture(sampling, prompts)


def _one_a_picture(sampling: SamplingConfig, prompts: list[Prompt]) -> list[Prompt]:
    """``prompts``; a single one for each picture of a plain folder that is to be changed."""
    if sampling.init_image is None or len(prompts) != 1:
        return prompts
    count = PictureFiles(sampling.init_image, "sampling.init_image").each or 1
    if count > 1:
        log.info("one prompt for each of the %d pictures in %s", count, sampling.init_image)
    return [replace(prompts[0], index=index) for index in range(count)]


def check_rows(sampling: SamplingConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse sizes and seeds of prompts' own that this run cannot have."""
    for prompt in prompts:
        own = prompt.row.own("height", "width", "seed")
        if own and sampling.latents is not None:
            raise UsageError(f"prompt {prompt.index} has its own {', '.join(own)}: not with sampling.latents")
        if prompt.row.controls is not None:
            from sat.sampling.controls import row_controls  # only where there are any

            row_controls(prompt)
        try:
            replace(sampling, **own)
        except RuleError as error:
            raise UsageError(f"prompt {prompt.index} of {sampling.prompt_file}: {error}") from error


def _wanted(experiment: Experiment, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of this run: those of ``sampling.share``, else all."""
    if experiment.sampling.share is None:
        return list(prompts)
    part, parts = parse_share(experiment.sampling.share)
    return list(prompts[part::parts])


def _inputs(experiment: Experiment) -> InputFolder | None:
    """The pictures that the experiment's process needs; None for a model that draws from noise alone."""
    wanted, sampling = components(experiment).process.input, experiment.sampling
    return InputFolder.of(sampling, wanted) if wanted is not None or sampling.input_dir is not None else None


def _check(cascade: Cascade, prompts: Sequence[Prompt] | None) -> None:
    """Say that the config is good, and what it still needs."""
    lines = [str(n) for stage in cascade.stages for n in (*stage.notices, *stage.missing)]
    for line in dict.fromkeys(lines):
        print(f"note: {line}")
    first, count = cascade.stages[0].experiment, "no prompts yet"
    if prompts is not None:
        count = f"{len(prompts)} prompt{'s' * (len(prompts) != 1)}"
        if first.sampling.share is not None:
            count = f"{len(_wanted(first, prompts))} of {count}"
    for stage in cascade.stages:
        device = pick_device(stage.experiment.parallel.device)
        experiment = settle_dtype(stage.experiment, device)
        sampling, name = experiment.sampling, f"{stage.name}: " if stage.name else ""
        print(
            f"config ok: {name}{count}, {sampling.batch_size} x {sampling.height} x {sampling.width} "
            f"(images x height x width), {sampling.steps} step{'s' * (sampling.steps != 1)}, {sampling.dtype}"
        )
        picked = apply_budget(experiment, device)
        if picked is not None:
            print(f"{name}{picked}")


@dataclass(frozen=True)
class _Ranks:
    """This process among the others."""

    runtime: Runtime
    mesh: Mesh


@dataclass(frozen=True)
class _Place:
    """One stage of a run with the folders of its pictures and of its records."""

    experiment: Experiment
    pictures: Path
    records: Path
    edits: EditInput | None = None
    factor: int = 1  # that its pictures are larger by than the first stage's
    controls: Sequence[Path] = ()  # files of controls in rows of the prompts


@dataclass(frozen=True)
class _Session:
    """A loaded stage with its output folder."""

    place: _Place
    ranks: _Ranks
    pipeline: Pipeline
    params: SamplingParams
    folder: OutputFolder
    edits: EditInput | None = None

    def draw(self, prompts: Sequence[Prompt], *, resume: bool = False) -> list[Path]:
        """Draw ``prompts`` into the folder; the files written."""
        inputs = _inputs(self.pipeline.experiment)
        watch = current() if self.ranks.runtime.world > 1 else None

        def beat(doing: str) -> None:
            if watch is not None:
                watch.ready(doing)  # a first step is over: what is compiled has been
            if ending.lock is not None and ending.lock.lost:
                ending.lock.check()

        controls = self.pipeline.control_pictures(self.pipeline.experiment.sampling, prompts=prompts)
        return self.pipeline.generator.save(
            self.folder,
            prompts,
            self.params,
            inputs=inputs,
            controls=controls,
            edits=self.edits,
            beat=beat,
            resume=resume,
        )


def _open(place: _Place, ranks: _Ranks, prompts: int, *, once: bool = False) -> _Session:
    """Prove that the output folder can be written, load the model, write the records.

    ``once``: all prompts are there; ``prompts``: their number.
    """
    started, runtime, mesh = time.monotonic(), ranks.runtime, ranks.mesh
    latents = place.experiment.sampling.latents
    given = None if latents is None else read_latents(latents)
    if mesh.leads:
        prove_writable(place.pictures)
    pipeline = Pipeline.open(place.experiment, runtime.device, mesh, once=once, controls=place.controls)
    experiment, engine = pipeline.experiment, pipeline.generator.engine
    sampling = experiment.sampling
    if runtime.device.type == "cpu" and experiment.memory.budget is None:
        keep_freed_memory()  # every step asks for the same large buffers; those of loading have gone by now
    if given is not None:
        shape = engine.latent_shape(sampling.height, sampling.width)
        given = checked_latents(given, shape, prompts, sampling.batch_size)
    weights = weight_digests(experiment)
    about = label(experiment, given, weights)
    folder = _folder(place, about)
    if runtime.is_main:
        record(
            place.records,
            replace(  # a fresh, whole run's: it draws everything again
                experiment,
                sampling=replace(sampling, share=None),
                output=replace(experiment.output, dir=place.pictures, resume=False),
            ),
            hooks=engine.hooks,
            world=runtime.world,
            seeds={"sampling": sampling.seed},
            weights=weights,
            device=str(runtime.device),
        )
        seconds = time.monotonic() - started
        several = f" ({mesh})" if runtime.world > 1 else ""
        log.info("loaded in %.1f s on %s%s", seconds, runtime.device, several)
        log.debug("%s", pipeline.generator.speed)
    params = SamplingParams.of(sampling, pipeline.guider, given)
    return _Session(place, ranks, pipeline, params, folder, place.edits)


def _folder(place: _Place, about: Label) -> OutputFolder:
    """The folder of a stage's pictures."""
    sampling, edits, regions = place.experiment.sampling, place.edits, {}
    if sampling.regions is not None:
        from sat.sampling.edit import Regions

        regions = Regions(sampling.regions, sampling.fit).fields()

    def more(prompt: Prompt, image: int) -> dict[str, str]:
        own: dict[str, str] = {}
        if prompt.row.controls is not None:
            from sat.sampling.controls import row_fields

            own = row_fields(prompt, image)
        return {**own, **({} if edits is None else edits.fields(prompt, image)), **regions}

    return OutputFolder(place.pictures, about, sampling.batch_size, sampling.grid_columns, more)


def _draw_all(cascade: Cascade, prompts: Sequence[Prompt], ranks: _Ranks) -> None:  # noqa: C901 - in order
    """Draw ``prompts`` stage by stage; each stage's weights are there only while it draws.

    The last stage draws into the output folder, those before it into OUT/stages/NAME.
    """
    runtime, mesh, last = ranks.runtime, ranks.mesh, cascade.stages[-1].experiment
    root, several = last.output.dir or OUTPUT, len(cascade.stages) > 1
    places: list[_Place] = []
    first = _edits(cascade.stages[0].experiment, prompts)
    for stage in cascade.stages:
        experiment, records = stage.experiment, root / STAGES / stage.name if several else root
        edits, factor = first, 1
        if places:
            wanted, before = components(experiment).process.input, places[-1]
            factor = before.factor * (1 if wanted is None else wanted.factor)
            sampling = replace(experiment.sampling, input_dir=before.pictures)
            if edits is not None:
                edits, sampling = edits.following(sampling, factor)
            experiment = replace(experiment, sampling=sampling)
        if edits is not None:
            edits = replace(edits, puts_back=stage is cascade.stages[-1])
        if last.output.resume:  # what was chosen for this run stands
            experiment = as_recorded(experiment, records / "resolved.yaml")
        pictures = root if stage is cascade.stages[-1] else records
        places.append(_Place(experiment, pictures, records, edits, factor))

    mine = _wanted(places[0].experiment, prompts)
    mine = mine[mesh.data_rank :: mesh.data_ranks]  # by place, as officially
    if places[0].experiment.sampling.controls or any(prompt.row.controls for prompt in mine):
        from sat.sampling.controls import check_pictures, row_files

        if mesh.leads:
            check_pictures(places[0].experiment, mine)
        places[0] = replace(places[0], controls=row_files(mine))
    inputs = _inputs(places[0].experiment)
    if inputs is not None and mesh.leads:  # before anything is loaded
        inputs.check(mine)
    if mesh.leads and (area := places[0].experiment.sampling).regions is not None:
        from sat.sampling.edit import Regions

        Regions(area.regions, area.fit).masks(area.height, area.width)
    if first is not None and mesh.leads:
        first.check(mine, places[0].experiment.sampling.batch_size)
    if several and last.output.resume:
        done, factor = _folder(places[-1], label(places[-1].experiment)), places[-1].factor
        whole = _enlarged(mine, factor)
        left = by_first(mesh.team, lambda: {p.index for p, _ in done.requests(whole, resume=True)})
        mine = [prompt for prompt in mine if prompt.index in left]
    stages = StageLoader(lambda index: _open(places[index], ranks, len(prompts), once=True))
    for index, place in enumerate(places):
        if several and runtime.is_main:
            log.info("stage %d of %d: %s", index + 1, len(places), place.records.name)
        own = _enlarged(mine, place.factor) if index else mine
        _draw(stages.open(index), prompts, own, result=index + 1 == len(places))
        stages.free()

    if several and runtime.is_main:  # the cascade that repeats the run
        files = {place.records.name: place.records / "resolved.yaml" for place in places}
        write_text(root / "resolved.yaml", dump_cascade(files, cascade.keep))
    if mesh.leads and not cascade.keep:
        for place in places[:-1]:
            for prompt in mine:
                shutil.rmtree(place.pictures / folder_name(prompt), ignore_errors=True)


def _enlarged(prompts: Sequence[Prompt], factor: int) -> list[Prompt]:
    """``prompts`` for a stage whose pictures are ``factor`` times larger."""
    rows = (replace(prompt.row.enlarged(factor), controls=None) for prompt in prompts)  # of the first alone
    return [replace(prompt, row=row) for prompt, row in zip(prompts, rows, strict=True)]


def _edits(experiment: Experiment, prompts: Sequence[Prompt]) -> EditInput | None:
    """The pictures that the experiment or the rows of ``prompts`` want changed."""
    s = experiment.sampling
    named = (s.init_image, s.mask, s.strength_map, s.strength, s.outpaint)
    if all(value is None for value in named) and all(prompt.row == NO_ROW for prompt in prompts):
        return None
    from sat.sampling.edit import EditInput  # only where there are any

    return EditInput.of(s, prompts)


def _draw(session: _Session, prompts: Sequence[Prompt], mine: Sequence[Prompt], *, result: bool) -> None:
    """Draw this rank's share ``mine`` of ``prompts`` and, for a ``result``, say where the pictures are."""
    main, started, folder = session.ranks.runtime.is_main, time.monotonic(), session.folder
    if main and (others := folder.strangers(prompts)):
        log.warning(
            "%s holds %d prompt folders of another run, such as %s", folder.root, len(others), others[0]
        )
    written = session.draw(mine, resume=session.place.experiment.output.resume)
    generator = session.pipeline.generator
    if main and generator.cache is not None:
        count = generator.count
        log.info("step cache: %d of %d evaluations were computed", count.computed, count.evaluations)
        amend(session.place.records, {"step_cache": asdict(count)})
    if not main or not result:
        return
    seconds = time.monotonic() - started
    log.info("%d file%s written in %.1f s", len(written), "s" * (len(written) != 1), seconds)
    if len(prompts) == 1:
        for path in written or [folder.folder(prompts[0])]:
            print(path)
    else:
        print(folder.root)


def _ask(session: _Session, rewrite: Callable[[str], str]) -> None:
    """Ask for prompts until end of file; each is rewritten and gets the next free number."""
    if session.ranks.runtime.world > 1:
        raise UsageError(
            "asking for prompts works in one process: give --prompt or --prompt-file, or run one"
        )
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - line editing and history for input()
    print("A prompt a line; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("prompt> ")
        except Stopped:
            raise
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        try:
            if not text.strip():
                continue
            check_text(text, "the prompt")
            for path in session.draw([Prompt(session.folder.next_index(), rewrite(text))]):
                print(path)
        except Stopped:
            raise
        except KeyboardInterrupt:
            print("\nstopped; the next prompt?", file=sys.stderr)
        except (ValueError, ArithmeticError, OSError) as error:
            print(f"error: {describe(error)}", file=sys.stderr)
