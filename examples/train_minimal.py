"""Training in one file: the small model from scratch on the sample pictures, and a picture of it.

    python examples/train_minimal.py --steps 600 --prompt "a red apple" --output apple.png

All of a training without YAML, ranks or checkpoints, over the parts in sat/ that are the model. Only the
autoencoder is a trained one (checkpoints/tiny). train.py does the same, with all that long runs need.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sat.conditioning.conditioner import Conditioner, SizeConditioner, Sizes
from sat.diffusion.draws import PictureDraws
from sat.diffusion.guidance import ClassifierFree
from sat.diffusion.prediction import V
from sat.diffusion.samplers import DDIM
from sat.diffusion.schedule import ZeroSNR
from sat.engine import DiffusionEngine
from sat.first_stage.model import AutoencoderKL, Posterior
from sat.models.cogview3_plus import CogView3Plus
from sat.models.t5 import T5Encoder
from sat.tokenizers import T5Tokenizer

TINY = ROOT / "checkpoints" / "tiny"
SIZE, SEED, DROPOUT, DECAY = 64, 0, 0.1, 0.99


def build() -> DiffusionEngine:
    """The network and the text encoder at random weights, around the trained autoencoder."""
    network = CogView3Plus(
        dim=256, heads=8, depth=6, channels=16, patch=2, text_dim=192, text_len=16, emb_dim=64, size_dim=192,
        table_size=(8, 8),
    )  # fmt: skip
    text = T5Encoder(dim=192, heads=6, head_dim=32, mlp_dim=512, depth=3, vocab=2048)
    tokenizer = T5Tokenizer(TINY / "tokenizer", max_length=16)
    conditioner = Conditioner(text, SizeConditioner(dim=32), tokenizer, max_length=16)
    first_stage = AutoencoderKL(
        width=16, multipliers=(1, 2, 4, 8), res_blocks=1, latent_channels=16, groups=8, scale_factor=0.65
    )
    first_stage.load_state_dict(load_file(TINY / "first_stage.safetensors"))
    first_stage.eval().requires_grad_(False)
    return DiffusionEngine(network, conditioner, first_stage, ZeroSNR(), V())


def pictures(folder: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """Pictures (N, 3, H, W) in [-1, 1] of a sample, and the captions of each."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(folder / row["file_name"]).convert("RGB").resize((SIZE, SIZE)) for row in rows]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (N, H, W, 3)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, [row["text"] for row in rows]


def train(engine: DiffusionEngine, steps: int, batch: int, lr: float) -> list[float]:
    """Train ``engine``; its weights are then their moving average. The loss of every step."""
    images, captions = pictures(ROOT / "data" / "emoji_sample")
    with torch.no_grad():
        moments = engine.first_stage.encode(images).moments  # (N, 2C, h, w), once and for all
    trained = [*engine.network.parameters(), *engine.conditioner.text.parameters()]
    average = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr, (0.9, 0.99), weight_decay=0.01)
    sizes, shape, losses = Sizes.uncropped(SIZE, SIZE, batch), engine.latent_shape(SIZE, SIZE), list[float]()
    for step in range(steps):
        for group in optimizer.param_groups:  # warm-up, then a straight fall
            group["lr"] = lr * min((step + 1) / 50, 1 - step / steps)

        # A batch, and its random numbers by the place of each picture.
        draws = PictureDraws(SEED, step, 0, batch, batch)
        chosen = draws.integers("picture", len(images)).tolist()
        lines = draws.integers("caption", 1000).tolist()
        texts = [captions[i][n % len(captions[i])] for i, n in zip(chosen, lines, strict=True)]
        x0 = Posterior.from_moments(moments[chosen]).sample(draws.normal("posterior", shape))
        x0 = x0 * engine.first_stage.scale_factor  # (B, C, h, w)
        cond = engine.conditioner.condition(texts, sizes).dropped(draws.uniform("drop") < DROPOUT)

        # Noise, predict, compare; then one step of the optimizer, and of the average.
        loss = engine.loss(x0, cond, draw=engine.draw(shape, draws)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, trained, 1 - min(DECAY, (step + 1) / (10 + step)))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}   loss {np.mean(losses[-50:]):.4f}")
    with torch.no_grad():
        torch._foreach_copy_(trained, average)
    return losses


def draw(engine: DiffusionEngine, prompt: str, steps: int) -> Image.Image:
    """A picture of ``prompt``."""
    with torch.no_grad():
        cond = engine.conditioner.condition([prompt], Sizes.uncropped(SIZE, SIZE, 1))
    noise = torch.randn(1, *engine.latent_shape(SIZE, SIZE), generator=torch.Generator().manual_seed(SEED))
    latents = engine.sample(cond, cond.null(), noise, steps=steps, guider=ClassifierFree(3.0), sampler=DDIM())
    pixels = engine.decode(latents)[0].permute(1, 2, 0)  # (H, W, 3) in [0, 1]
    return Image.fromarray((pixels * 255).round().byte().numpy())


def main() -> None:
    """Train, draw, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--output", type=Path, default=Path("train_minimal.png"))
    args = parser.parse_args()
    torch.manual_seed(SEED)
    engine = build()
    train(engine, args.steps, args.batch, args.lr)
    draw(engine.eval(), args.prompt, 50).resize((256, 256)).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
