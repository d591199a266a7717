"""Trainings of the UNet family, one after the other in one process so that DeepSpeed is imported once.

``python -m tests.smoke.unet_runs FOLDER SPIECE`` writes FOLDER/ends.json; test_unet_training.py reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
from pathlib import Path

from sat.cli.train import main
from tests.configs import DEBUG, ROOT

TOY = ROOT / "tests" / "assets" / "toy"
TRAIN = """\
train:
  objective: {{target: sat.train.objectives.diffusion.DiffusionObjective}}
  steps: 4
  batch_size: 4
  lr: 1.0e-3
  ema: 0.9
  log_every: 1
  save_every: 2
  validate_every: 4
  keep_last: 10
  wandb: disabled
diffusion:
  loss:
    target: sat.diffusion.loss.DenoisingLoss
    params: {{offset_noise: 0.05, weighting: {{target: sat.diffusion.loss.MinSNR}}}}
data:
  sources: [{{path: {root}/data/emoji_sample}}]
  validation: [{{path: {root}/data/emoji_sample}}]
  height: 32
  width: 48
conditioning: {{tokenizer: {spiece}}}
parallel: {{device: cpu}}
"""
DISTILL = """\
model: {{params: {{guidance_dim: 16}}}}
train:
  objective:
    target: sat.train.objectives.distillation.Distillation
    params: {{teacher_steps: 8, rounds: [4, 2], guidance: [1.0, 4.0]}}
sampling:
  guider: {{target: sat.diffusion.guidance.Embedded, params: {{scale: 2.0}}}}
checkpoint: {{allow_missing: [guidance.weight]}}
"""
CONSISTENT = """\
train:
  objective:
    target: sat.train.objectives.consistency.Consistency
    params: {{guidance: 2.0, terminal: 0.3, warmup: 3}}
"""
MATCHING = """\
train:
  objective:
    target: sat.train.objectives.matching.Matching
    params: {{guidance: 2.0, steps: 2, student_every: 2}}
"""


def everything(folder: Path, spiece: Path) -> None:
    """All runs."""
    (folder / "train.yaml").write_text(TRAIN.format(root=ROOT, spiece=spiece))
    (folder / "distill.yaml").write_text(DISTILL.format())
    (folder / "matching.yaml").write_text(MATCHING.format())
    (folder / "consistent.yaml").write_text(CONSISTENT.format())
    ends = {}

    def run(name: str, files: list[Path], *arguments: object, to: str = "") -> None:
        out, err = io.StringIO(), io.StringIO()
        words = ["--base", *map(str, [DEBUG, *files]), "--output-dir", str(folder / (to or name))]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*words, *map(str, arguments)])
            logging.shutdown()
        ends[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}

    base, relay = TOY / "base.yaml", TOY / "relay.yaml"
    train, distill = folder / "train.yaml", folder / "distill.yaml"
    plain = ("diffusion.loss=null",)
    run("base", [base, train])
    run("recomputed", [base, train], "train.activation_checkpointing=true")
    run("relay", [base, relay, train])
    run("relay_cached", [base, relay, train], "data.cache_views=1", "--steps", 2)
    run("relay_plus", [folder / "plus_relay.yaml", train], *plain, "--steps", 2)
    teacher = f"checkpoint.model={folder / 'base' / 'checkpoints' / 'step_00000004' / 'native'}"
    run("distilled", [base, train, distill], *plain, teacher)
    consistent, factors = folder / "consistent.yaml", ("adapters.lora.rank=2", "train.ema=null")
    run("consistent", [base, train, consistent], *plain, teacher)
    run("consistent_cut", [base, train, consistent], *plain, teacher, "train.max_minutes=1e-9")
    run("consistent_on", [base, train, consistent], *plain, teacher, "--resume", to="consistent_cut")
    native = f"checkpoint.model={folder / 'relay' / 'checkpoints' / 'step_00000004' / 'native'}"
    exact = "train.objective.params.derivative=jvp"
    run("consistent_exact", [base, train, consistent], *plain, teacher, exact)
    torch_attention = ("train.attention=torch", "--steps", 2)
    run("consistent_exact_plus", [train, consistent], *plain, exact, *torch_attention)
    run("consistent_lora", [base, relay, train, consistent], *plain, native, *factors)
    matching, rcm = folder / "matching.yaml", ("train.objective.params.method=rcm", "train.zero=2")
    run("matching", [base, train, matching], *plain, teacher)
    lora = [[base, relay, train, matching], *plain, native, *factors, *rcm]
    run("matching_lora", *lora)
    run("matching_lora_cut", *lora, "train.max_minutes=1e-9")
    run("matching_lora_on", *lora, "--resume", to="matching_lora_cut")
    run("cut", [base, train, distill], *plain, teacher, "train.max_minutes=1e-9")
    run("again", [base, train, distill], *plain, teacher, to="cut")
    run("rest", [base, train, distill], *plain, teacher, "--resume", to="cut")
    alone = "{target: sat.diffusion.guidance.Unguided}"
    lora = [*factors, "model.params.guidance_dim=null", "train.objective.params.guidance=3.0", "train.zero=2",
            f"sampling.guider={alone}", "checkpoint.allow_missing=[]"]  # fmt: skip
    rounds = [[base, train, distill], *plain, teacher, *lora]
    run("rounds_lora", *rounds)
    run("rounds_lora_cut", *rounds, "train.max_minutes=1e-9")  # within the first
    run("rounds_lora_on", *rounds, "--resume", to="rounds_lora_cut")
    between = folder / "rounds_lora_between"  # as if killed after the first had ended
    shutil.copytree(folder / "rounds_lora" / "steps_4", between / "steps_4")
    run("rounds_lora_second_cut", *rounds, "train.max_minutes=1e-9", "--resume", to=between.name)
    run("rounds_lora_rest", *rounds, "--resume", to=between.name)
    run("relay_distilled", [base, relay, train, distill], *plain, "--steps", 2)
    run("plus_distilled", [train, distill], *plain, "--steps", 2)
    run("no_embedding", [base, train, distill], *plain, "model.params.guidance_dim=null", "sampling.guider="
        "{target: sat.diffusion.guidance.Unguided}")  # fmt: skip
    # Last: ZeRO 3 puts a product of its own, with other roundings, in place of torch's for the whole process.
    run("matching_zero3", [base, train, matching], *plain, teacher, "train.zero=3", "--steps", 2)
    (folder / "ends.json").write_text(json.dumps(ends))


PLUS_RELAY = """\
diffusion:
  process:
    target: sat.diffusion.process.Process
    params: {mixins: {relay: {target: sat.mixins.relay.RelayNoise, params: {blend: exp}}}}
"""


if __name__ == "__main__":
    (Path(sys.argv[1]) / "plus_relay.yaml").write_text(PLUS_RELAY)
    everything(Path(sys.argv[1]), Path(sys.argv[2]))
