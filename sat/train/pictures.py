"""Pictures of fixed prompts, drawn while a training runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sat.checkpoint.format import DTYPES
from sat.config.build import components
from sat.config.schema import Experiment
from sat.engine import DiffusionEngine
from sat.parallel.heartbeat import current
from sat.parallel.launch import Mesh, Runtime
from sat.sampling.generator import EncodedPrompt, Generator, SamplingParams, SteeringPictures
from sat.sampling.inputs import InputFolder
from sat.sampling.output import grid, safe_name, write_png
from sat.sampling.prompts import Prompt

log = logging.getLogger(__name__)


class Pictures:
    """Draws ``train.sample_prompts`` as the sampling section says; the data ranks take turns.

    Prompts are encoded once, now, unless the text encoder ``learns``. ``known`` are the encodings of all
    of them, for an engine without a text encoder. An encoder that ``memory.text_encoder`` would not keep
    waits in host memory while pictures are drawn; the next captions fetch it back.
    """

    def __init__(
        self,
        experiment: Experiment,
        engine: DiffusionEngine,
        runtime: Runtime,
        mesh: Mesh,
        *,
        learns: bool,
        known: Sequence[EncodedPrompt] | None = None,
    ) -> None:
        assert experiment.train is not None, "only a training draws in between"
        self.prompts = experiment.train.sample_prompts
        self.runtime, self.mesh = runtime, mesh
        self.generator = Generator(
            engine, components(experiment).sampler, runtime.device,
            decode_batch=experiment.memory.decode_batch, team=mesh.team,
        )  # fmt: skip
        self.params = SamplingParams.of(experiment.sampling, components(experiment).guider)
        self.inputs: InputFolder | None = None
        self.controls: SteeringPictures | None = None
        if experiment.sampling.init_image is not None:
            log.warning("sampling.init_image has no effect on the pictures of a training")
        self.mine = range(mesh.data_rank, len(self.prompts), mesh.data_ranks)
        self._waits = not learns and known is None and experiment.memory.text_encoder != "keep"
        self._encoded: list[EncodedPrompt] | None = None
        if known is not None:
            dtype = DTYPES[experiment.train.dtype]
            self._encoded = []
            for one in (known[index] for index in self.mine):
                negative = None if one.negative is None else one.negative.to(dtype)
                self._encoded.append(replace(one, text=one.text.to(dtype), negative=negative))
        elif not learns:
            self._encoded = self._encode()

    def enlarge(self, inputs: InputFolder) -> None:
        """Start from the pictures of ``inputs``, which must be there for every prompt."""
        inputs.check([Prompt(index, text) for index, text in enumerate(self.prompts)])
        self.inputs = inputs

    def __call__(self, folder: Path) -> None:
        """One picture of each prompt into ``folder``, and a grid where one rank has them all."""
        encoded = self._encode() if self._encoded is None else self._encoded
        if self._waits:
            self.generator.engine.conditioner.text_encoder_to(torch.device("cpu"))
            self.runtime.free_memory()
        pictures = []
        for index, text in zip(self.mine, encoded, strict=True):
            prompt = Prompt(index, self.prompts[index])
            params = replace(self.params, seed=self.params.seed + index)
            drawn = self.generator.generate(
                [(prompt, [0])], params, inputs=self.inputs, encoded=[text], controls=self.controls,
                callback=lambda done, total, _: current().mark(f"drawing samples: step {done} of {total}"),
            )  # fmt: skip
            for picture in drawn:
                if picture.image is not None:  # on the first rank of a team
                    folder.mkdir(parents=True, exist_ok=True)
                    name = f"{index:02d}_{safe_name(prompt.text)}.png"
                    write_png(folder / name, picture.image, {"prompt": prompt.text})
                    pictures.append(picture.image)
        if self.mesh.data_ranks == 1 and len(pictures) > 1:
            write_png(folder / "grid.png", grid(pictures, columns=min(8, len(pictures))))

    def _encode(self) -> list[EncodedPrompt]:
        """The prompts of this rank through the text encoder."""
        return self.generator.encode([self.prompts[i] for i in self.mine], self.params.negative_prompt)
