"""CogView3-Plus with a control, for ``DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)``.

Written by ``convert.py CONTROL OUT --to diffusers --model MODEL``; needs nothing but diffusers.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import CogView3PlusPipeline


class CogView3PlusControlPipeline(CogView3PlusPipeline):
    """CogView3PlusPipeline whose pictures a control's picture steers: outlines, a silhouette and the like."""

    def __init__(self, tokenizer, text_encoder, vae, transformer, scheduler, controlnet) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(controlnet=controlnet)

    @torch.no_grad()
    def __call__(
        self,
        *args,
        control_image=None,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        guess_mode: bool = False,
        **kwargs,
    ):
        """As CogView3PlusPipeline, steered by ``control_image``: one picture, or a list of one a prompt.

        ``control_guidance_start`` and ``control_guidance_end`` are shares of the noise range, not of the
        steps: 0 is pure noise, 1 a clean picture. ``guess_mode``: only the half of guidance with the prompt
        is steered.
        """
        given = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
        if control_image is None or not controlnet_conditioning_scale:
            return super().__call__(*args, **kwargs)
        side = self.transformer.config.sample_size * self.vae_scale_factor
        height, width = given.get("height") or side, given.get("width") or side
        pictures = self.image_processor.preprocess(control_image, height, width)
        device, dtype = self._execution_device, self.vae.dtype
        if self.controlnet.config.cell:
            control = pictures.to(device).float().add(1).div(2)
        else:
            control = self.vae.encode(pictures.to(device, dtype)).latent_dist.mode()
            control = control.float() * self.vae.config.scaling_factor
        prompt = given.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) else 1
        if prompt is None and given.get("prompt_embeds") is not None:
            prompts = len(given["prompt_embeds"])
        if len(control) not in (1, prompts):
            raise ValueError(f"{len(control)} control images for {prompts} prompts: give 1, or one a prompt")
        images = given.get("num_images_per_prompt", 1)
        control = control.expand(prompts, -1, -1, -1).repeat_interleave(images, 0)
        scale = torch.full((len(control), 1, 1), float(controlnet_conditioning_scale), device=device)
        if given.get("guidance_scale", 5.0) > 1:
            control = torch.cat([control, control])
            scale = torch.cat([torch.zeros_like(scale) if guess_mode else scale, scale])

        def acts(timestep: torch.Tensor) -> bool:
            kept = self.scheduler.alphas_cumprod[int(timestep.flatten()[0])]
            place = 1 - float((1 - kept).sqrt())
            return control_guidance_start <= place <= control_guidance_end

        with self.controlnet.attached(self.transformer, control, scale, acts):
            return super().__call__(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """The folder with its code files, which diffusers leaves out, so that it opens again."""
        super().save_pretrained(save_directory, *args, **kwargs)
        root = Path(save_directory)
        own, side = (sys.modules[type(one).__module__].__file__ for one in (self, self.controlnet))
        shutil.copyfile(own, root / "pipeline.py")
        shutil.copyfile(side, root / "controlnet" / "control.py")
        index = root / "model_index.json"
        told = json.loads(index.read_text())
        told["_class_name"] = ["pipeline", type(self).__name__]
        told["controlnet"] = ["control", type(self.controlnet).__name__]
        index.write_text(json.dumps(told, indent=2) + "\n")
