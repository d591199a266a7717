"""Names from before the rings that stand in users' files: they keep working, with a notice of today's name.

Configs are translated while they are read (:func:`target`, :data:`KEYS`, :data:`PARAMETERS`). Python imports
of old modules and names are answered by a finder that :func:`install` adds. Standard library only.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader
else:  # importing the module takes as long as the rest of `import sat`
    Loader = object

MODULES: dict[str, str] = {
    "sat.adapters.convert": "sat.adapters.write",
    "sat.adapters.select": "sat.adapters.names",
    "sat.checkpoint.digest": "sat.checkpoint.formats",
    "sat.checkpoint.fit": "sat.checkpoint.rules",
    "sat.checkpoint.formats.hf_t5": "sat.checkpoint.formats.diffusers",
    "sat.checkpoint.formats.native": "sat.checkpoint.formats",
    "sat.checkpoint.safetensors_file": "sat.checkpoint.format",
    "sat.checkpoint.whole": "sat.checkpoint.files",
    "sat.cli.cache_work": "sat.cli.commands.prepare",
    "sat.cli.evaluate_work": "sat.cli.commands.evaluate",
    "sat.cli.guard": "sat.cli.main_guard",
    "sat.cli.plan": "sat.cli.commands.estimate",
    "sat.cli.preference_work": "sat.cli.commands.evaluate",
    "sat.cli.prompt_optimize": "sat.cli.prompt",
    "sat.cli.rewriting": "sat.cli.commands.prompt",
    "sat.cli.sample_work": "sat.cli.commands.sample",
    "sat.cli.stages": "sat.cli.commands.sample",
    "sat.cli.train_work": "sat.cli.commands.train",
    "sat.cli.web_work": "sat.cli.commands.web",
    "sat.conditioning.condition": "sat.conditioning.conditioner",
    "sat.conditioning.prompt_optimizer": "sat.apps.prompts.optimizer",
    "sat.conditioning.prompt_writing": "sat.apps.prompts.writing",
    "sat.conditioning.size": "sat.conditioning.conditioner",
    "sat.conditioning.text": "sat.conditioning.conditioner",
    "sat.config.absent": "sat.config.build",
    "sat.config.between": "sat.config.constraints",
    "sat.config.component": "sat.config.check",
    "sat.config.fill": "sat.config.build",
    "sat.config.label": "sat.config.record",
    "sat.config.official_diffusion": "sat.config.official",
    "sat.config.official_tree": "sat.config.official_keys",
    "sat.config.paths": "sat.config.yaml_source",
    "sat.config.refuse": "sat.config.constraints",
    "sat.config.schema.adapters": "sat.config.schema.experiment",
    "sat.config.schema.data": "sat.config.schema.experiment",
    "sat.config.schema.memory": "sat.config.schema.experiment",
    "sat.config.schema.model": "sat.config.schema.base",
    "sat.config.schema.run": "sat.config.schema.base",
    "sat.config.schema.sampling": "sat.config.schema.base",
    "sat.config.schema.train": "sat.config.schema.experiment",
    "sat.config.source": "sat.config.yaml_source",
    "sat.config.targets": "sat.config.check",
    "sat.data.emoji": "sat.apps.emoji",
    "sat.data.emoji.build": "sat.apps.emoji.build",
    "sat.data.emoji.captions": "sat.apps.emoji.concepts",
    "sat.data.emoji.concepts": "sat.apps.emoji.concepts",
    "sat.data.emoji.icons": "sat.apps.emoji.build",
    "sat.data.emoji.packages": "sat.apps.emoji.concepts",
    "sat.data.order": "sat.data.batch",
    "sat.data.parquet": "sat.data.formats",
    "sat.data.shards": "sat.data.formats",
    "sat.data.tables": "sat.data.formats",
    "sat.data.vocabulary": "sat.data.sources",
    "sat.diffusion.denoiser": "sat.diffusion.prediction",
    "sat.diffusion.level": "sat.diffusion.schedule",
    "sat.diffusion.parameterisation": "sat.diffusion.prediction",
    "sat.diffusion.relay": "sat.mixins.relay",
    "sat.diffusion.sampler": "sat.diffusion.samplers",
    "sat.diffusion.spacing": "sat.diffusion.schedule",
    "sat.diffusion.weighting": "sat.diffusion.loss",
    "sat.evaluate": "sat.apps.evaluate",
    "sat.evaluate.augment": "sat.apps.evaluate.training",
    "sat.evaluate.classifier": "sat.apps.evaluate.classifier",
    "sat.evaluate.detail": "sat.apps.evaluate.classifier",
    "sat.evaluate.features": "sat.apps.evaluate.distances",
    "sat.evaluate.judges": "sat.apps.evaluate.metrics",
    "sat.evaluate.kernel": "sat.apps.evaluate.distances",
    "sat.evaluate.limit": "sat.apps.evaluate.distances",
    "sat.evaluate.pictures": "sat.apps.evaluate.pictures",
    "sat.evaluate.preference": "sat.apps.preference",
    "sat.evaluate.preference.pairs": "sat.apps.preference.study",
    "sat.evaluate.preference.server": "sat.apps.preference.server",
    "sat.evaluate.preference.statistics": "sat.apps.preference.votes",
    "sat.evaluate.preference.votes": "sat.apps.preference.votes",
    "sat.evaluate.prompts": "sat.apps.evaluate.pictures",
    "sat.evaluate.report": "sat.apps.evaluate.report",
    "sat.evaluate.retrieval": "sat.apps.evaluate.classifier",
    "sat.evaluate.scores": "sat.apps.evaluate.report",
    "sat.evaluate.towers": "sat.apps.evaluate.backbones",
    "sat.evaluate.training": "sat.apps.evaluate.training",
    "sat.first_stage.autoencoder": "sat.first_stage.model",
    "sat.first_stage.blocks": "sat.first_stage.model",
    "sat.first_stage.decoder": "sat.first_stage.model",
    "sat.first_stage.encoder": "sat.first_stage.model",
    "sat.first_stage.posterior": "sat.first_stage.model",
    "sat.memory.budget": "sat.estimate.budget",
    "sat.memory.offload": "sat.offload.block_swap",
    "sat.memory.quantize": "sat.kernels.quantize",
    "sat.memory.size": "sat.util.host",
    "sat.mixins.feature_map": "sat.mixins.patch_embed",
    "sat.mixins.final_layer": "sat.mixins.patch_embed",
    "sat.mixins.final_norm": "sat.mixins.text_encoder",
    "sat.mixins.heads": "sat.mixins.patch_embed",
    "sat.mixins.relative_bias": "sat.mixins.text_encoder",
    "sat.mixins.token_embed": "sat.mixins.text_encoder",
    "sat.models.cogview3_plus.plan": "sat.models.cogview3_plus.keys",
    "sat.models.cogview3_unet.blocks": "sat.models.cogview3_unet.model",
    "sat.models.cogview3_unet.plan": "sat.models.cogview3_unet.keys",
    "sat.models.cogview3_unet.unet": "sat.models.cogview3_unet.model",
    "sat.models.t5.encoder": "sat.models.t5.model",
    "sat.models.t5.plan": "sat.models.t5.keys",
    "sat.models.t5.tokenizer": "sat.tokenizers",
    "sat.parallel.apply": "sat.parallel.tensor",
    "sat.parallel.guidance": "sat.parallel.cfg_parallel",
    "sat.parallel.linear": "sat.parallel.tensor",
    "sat.parallel.mesh": "sat.parallel.launch",
    "sat.parallel.pretend": "sat.parallel.launch",
    "sat.parallel.watch": "sat.parallel.heartbeat",
    "sat.plan": "sat.sharding",
    "sat.sampling.draw": "sat.sampling.generator",
    "sat.sampling.latents": "sat.sampling.inputs",
    "sat.sampling.run": "sat.sampling.generator",
    "sat.sampling.sizes": "sat.config.schema.base",
    "sat.sampling.speed": "sat.kernels.apply",
    "sat.train.caches": "sat.train.data",
    "sat.train.ema": "sat.train.optim",
    "sat.train.export": "sat.train.checkpoints",
    "sat.train.fit": "sat.train.estimate",
    "sat.train.flops": "sat.train.log",
    "sat.train.plan": "sat.train.estimate",
    "sat.train.step": "sat.train.loop",
    "sat.train.stop": "sat.train.loop",
    "sat.train.trace": "sat.estimate.trace",
    "sat.train.validate": "sat.train.loop",
    "sat.transformer.attention": "sat.transformer.transformer",
    "sat.transformer.block": "sat.transformer.transformer",
    "sat.transformer.context": "sat.transformer.hooks",
    "sat.transformer.exp_attention": "sat.kernels.exp_attention",
    "sat.transformer.fast": "sat.kernels.compile",
    "sat.transformer.frozen": "sat.kernels.packed",
    "sat.transformer.kernels": "sat.kernels.attention",
    "sat.transformer.packed": "sat.kernels.packed",
    "sat.transformer.points": "sat.transformer.hooks",
    "sat.util.errors": "sat.util.log",
    "sat.util.files": "sat.util.host",
    "sat.util.images": "sat.sampling.output",
    "sat.util.progress": "sat.util.log",
    "sat.util.rng": "sat.sampling.generator",
    "sat.util.threads": "sat.util.host",
    "sat.web": "sat.apps.web",
    "sat.web.access": "sat.apps.web.serve",
    "sat.web.api": "sat.apps.web.api",
    "sat.web.layout": "sat.apps.web.page",
    "sat.web.line": "sat.apps.web.job_queue",
    "sat.web.page": "sat.apps.web.page",
    "sat.web.preview": "sat.apps.web.preview",
    "sat.web.serve": "sat.apps.web.serve",
    "sat.web.studio": "sat.apps.web.service",
    "sat.web.wish": "sat.apps.web.request",
}
"""Old module -> its module now."""

NAMES: dict[str, str] = {
    "sat.data.cache.Cached": "sat.data.cache.CachedDataset",
    "sat.util.progress.Bar": "sat.util.log.progress",
    "sat.util.progress.Silent": "sat.util.log.progress",
    "sat.util.threads.prepare": "sat.util.host.prepare_threads",
    "sat.data.loader.once": "sat.data.loader.validation_batches",
    "sat.data.order.Schedule": "sat.data.batch.BatchOrder",
    "sat.data.order.Stream": "sat.data.batch.ItemStream",
    "sat.data.order.whole": "sat.data.batch.one_group",
    "sat.data.records.Bad": "sat.data.records.BadRecord",
    "sat.data.survey.look": "sat.data.survey.inspect_picture",
    "sat.data.survey.sheet": "sat.data.survey.contact_sheet",
    "sat.data.transforms.Draws": "sat.data.transforms.Placement",
    "sat.data.transforms.Fitted": "sat.data.transforms.Resized",
    "sat.data.transforms.moved": "sat.data.transforms.augmented",
    "sat.adapters.factors.fresh": "sat.adapters.factors.initial_factors",
    "sat.adapters.files.About": "sat.adapters.files.AdapterInfo",
    "sat.adapters.merge.Loading": "sat.adapters.merge.AdapterRef",
    "sat.adapters.names.Flat": "sat.adapters.names.Unfused",
    "sat.checkpoint.fit.Fit": "sat.checkpoint.rules.Matched",
    "sat.checkpoint.fit.fit": "sat.checkpoint.rules.best_layout",
    "sat.checkpoint.whole.whole_folder": "sat.checkpoint.files.atomic_folder",
    "sat.diffusion.parameterisation.Parameterisation": "sat.diffusion.prediction.Prediction",
    "sat.train.objectives.consistency.Consistency": "sat.train.objectives.distillation.Distillation",
    "sat.train.objectives.matching.Matching": "sat.train.objectives.distillation.Distillation",
    "sat.diffusion.process.Near": "sat.diffusion.process.LevelAtSigma",
    "sat.evaluate.judges.Judge": "sat.apps.evaluate.metrics.Metric",
    "sat.evaluate.judges.KINDS": "sat.apps.evaluate.metrics.METRICS",
    "sat.evaluate.judges.Setting": "sat.apps.evaluate.metrics.MetricConfig",
    "sat.evaluate.judges.lacking": "sat.apps.evaluate.metrics.missing",
    "sat.evaluate.scores.take": "sat.apps.evaluate.report.compute_scores",
    "sat.memory.budget.Picked": "sat.estimate.budget.Budgeted",
    "sat.memory.budget.Planner": "sat.estimate.budget.SamplingEstimator",
    "sat.memory.budget.Way": "sat.estimate.budget.MemoryOption",
    "sat.memory.budget.within": "sat.estimate.budget.apply_budget",
    "sat.memory.offload.Carousel": "sat.offload.block_swap.BlockSwap",
    "sat.memory.offload.Guest": "sat.offload.block_swap.OffloadedPart",
    "sat.memory.offload.Stages": "sat.offload.block_swap.OffloadSchedule",
    "sat.memory.offload.hosted": "sat.offload.block_swap.offloaded_parts",
    "sat.memory.offload.stages": "sat.offload.block_swap.offload_schedule",
    "sat.mixins.heads.FinalNorm": "sat.mixins.text_encoder.FinalNorm",
    "sat.mixins.patch_embed.TokenEmbed": "sat.mixins.text_encoder.TokenEmbed",
    "sat.mixins.rope.Rope": "sat.mixins.rope.RoPE",
    "sat.parallel.linear.PackedRowLinear": "sat.kernels.packed.PackedRowLinear",
    "sat.transformer.fast.pack": "sat.kernels.packed.pack",
    "sat.models.t5.T5Tokenizer": "sat.tokenizers.T5Tokenizer",
    "sat.models.t5.Tokens": "sat.conditioning.conditioner.Tokens",
    "sat.models.t5.tokenizer.Tokens": "sat.conditioning.conditioner.Tokens",
    "sat.parallel.apply.apply_plan": "sat.parallel.tensor.apply_sharding",
    "sat.parallel.apply.check_plan": "sat.parallel.tensor.check_sharding",
    "sat.parallel.collectives.ToldError": "sat.errors.ReportedError",
    "sat.parallel.guidance.SharedGuidance": "sat.parallel.cfg_parallel.CfgParallel",
    "sat.parallel.pretend.pretended": "sat.parallel.launch.fake_group",
    "sat.parallel.watch.Watch": "sat.parallel.heartbeat.Heartbeat",
    "sat.pipeline.asked_again": "sat.pipeline.keep_text_encoder",
    "sat.plan.Plan": "sat.sharding.Sharding",
    "sat.plan.family_plan": "sat.sharding.family_sharding",
    "sat.plan.shards": "sat.checkpoint.load.shards",
    "sat.sampling.draw.Drawer": "sat.sampling.generator.Generator",
    "sat.sampling.draw.Encoded": "sat.sampling.generator.EncodedPrompt",
    "sat.sampling.draw.Look": "sat.sampling.generator.SamplingParams",
    "sat.train.deepspeed.TrainEngine": "sat.train.deepspeed.DeepSpeedBackend",
    "sat.train.fit.fit": "sat.train.estimate.find_settings",
    "sat.train.plan.Plan": "sat.train.estimate.Estimate",
    "sat.train.plan.Planner": "sat.train.estimate.Estimator",
    "sat.web.line.FullError": "sat.apps.web.job_queue.QueueFullError",
    "sat.web.line.Line": "sat.apps.web.job_queue.JobQueue",
    "sat.web.studio.Offer": "sat.apps.web.service.AdapterEntry",
    "sat.web.studio.Studio": "sat.apps.web.service.GenerationService",
    "sat.web.wish.Wish": "sat.apps.web.request.GenerationRequest",
    "sat.web.wish.WishError": "sat.apps.web.request.RequestError",
}
"""Old ``module.name`` -> ``module.name`` now, for names that changed themselves (not only their module).

In a config every one of them is translated; in Python those of modules that moved (:data:`MODULES`).
"""

KEYS: dict[str, str] = {
    "diffusion.parameterisation": "diffusion.prediction",
}
"""Old dotted key of a config (``section.key``) -> the key now."""

PARAMETERS: dict[str, dict[str, str]] = {}
"""Target of today -> {old parameter: parameter now}."""

MEANT: dict[str, dict[str, Any]] = {
    "sat.train.objectives.consistency.Consistency": {"method": "consistency"},
    "sat.train.objectives.matching.Matching": {"method": "dmd2"},
}
"""Old target that is one of several today -> the parameters that say which, where they are not given."""


def target(name: str) -> str:
    """``name``, a dotted path as a config's ``target`` gives it, as it is called now."""
    if name in NAMES:
        return NAMES[name]
    module, _, attribute = name.rpartition(".")
    moved = MODULES.get(module)
    return name if moved is None else f"{moved}.{attribute}"


def today(sections: Mapping[str, Any]) -> dict[str, Any]:
    """``sections`` of a manifest's config with today's names of targets, keys and parameters."""

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if not isinstance(value, dict):
            return value
        out = {name: renamed(item) for name, item in value.items()}
        if isinstance(out.get("target"), str):
            out["target"] = target(out["target"])
            words = PARAMETERS.get(out["target"], {})
            if isinstance(out.get("params"), dict):
                out["params"] = {words.get(name, name): item for name, item in out["params"].items()}
        return out

    tree: dict[str, Any] = {name: renamed(value) for name, value in sections.items()}
    for old, new in KEYS.items():
        section, _, last = old.partition(".")
        holder = tree.get(section)
        if isinstance(holder, dict) and last in holder:
            holder.setdefault(new.rpartition(".")[2], holder.pop(last))
    return tree


FOLDERS = {"sat.memory", "sat.web", "sat.evaluate", "sat.evaluate.preference", "sat.data.emoji"}
"""Packages that are gone."""


class _Aliases(Loader):
    """Makes a module of the old name whose attributes are those of today's module."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # the usual one

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        if old not in MODULES:
            return  # a folder that is gone
        if old not in FOLDERS:  # else its modules say it themselves
            warnings.warn(f"{old} is now {MODULES[old]}: import it from there", FutureWarning, stacklevel=2)

        def attribute(name: str) -> Any:
            if name == "__path__":
                raise AttributeError(name)
            where, _, today = target(f"{old}.{name}").rpartition(".")
            return getattr(import_module(where), today)

        vars(module)["__getattr__"] = attribute


class _Finder:
    """Finds old modules, which the ordinary finders do not know."""

    find_spec = staticmethod(
        lambda name, path=None, target=None: (
            ModuleSpec(name, _Aliases(), is_package=name in FOLDERS)
            if name in MODULES or name in FOLDERS
            else None
        )
    )


def install() -> None:
    """Add the finder behind the ordinary ones, once: no import of today's names comes to it."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
