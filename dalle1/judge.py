"""The judge: a small network that says which noun and which fill a Toybox picture shows.

Not in the paper, which asked people (appendix F). Here a classifier answers, so that anyone can
repeat the count: it sees renderings of every pair, held-out pairs too, and never a caption. It is
trained on blurred, blocky and shifted renderings so that it forgives what a discrete VAE does to
a picture, and `evaluate.py` measures it on clean renderings before it believes a word it says.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from dalle1.files import write_whole

PICTURE_SIZE = 128  # of what the judge learns from; it takes any size and makes it smaller
KEEP_EVERY = 200  # steps of a training
BUNDLED = Path(__file__).parent / "bundled" / "judge.safetensors"


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What the judge looks at, and the names it may answer with."""

    nouns: tuple[str, ...]
    fills: tuple[str, ...]
    image_size: int = 96
    widths: tuple[int, ...] = (24, 48, 96, 128)

    def __post_init__(self) -> None:
        if not self.nouns or not self.fills:
            raise ValueError("a judge needs at least one noun and one fill to choose from")
        if len(self.widths) < 2:
            raise ValueError(f"widths must name a stem and a stage at least, got {self.widths}")


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one picture."""

    noun: str
    fill: str


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a 1×1 shortcut; halves the picture."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] → [B, C_out, H/2, W/2]
        return F.relu(self.body(x) + self.shortcut(x))


class Eye(nn.Module):
    """A small residual network without a head: what every judge looks with."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        stem = config.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        self.stages = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(config.widths)))

    def features(self, images: Tensor) -> Tensor:
        """Look at `images` [B, 3, H, W] in [0, 1]: [B, C, h, w]."""
        size = (self.config.image_size, self.config.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        x = (2 * images - 1).to(memory_format=torch.channels_last)
        return self.stages(self.stem(x))


class Judge(Eye):
    """An eye with two heads: for the noun and for the fill of one thing."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__(config)
        last = config.widths[-1]
        self.noun = nn.Linear(2 * last, len(config.nouns))
        self.fill = nn.Linear(2 * last, len(config.fills))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of nouns and fills for `images` [B, 3, H, W] in [0, 1]."""
        x = self.features(images)
        # The mean tells textures, the maximum tells parts that are small or at the edge.
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)  # [B, 2C]
        return self.noun(x), self.fill(x)

    @torch.inference_mode()
    def verdicts(self, pictures: Sequence[Image.Image], batch_size: int = 64) -> list[Verdict]:
        """Say what each picture shows; the network must be in evaluation mode."""
        assert not self.training, "call .eval() first: batch statistics would leak between pictures"
        device = self.noun.weight.device
        found = []
        for start in range(0, len(pictures), batch_size):
            batch = as_tensor(pictures[start : start + batch_size]).to(device)
            noun, fill = (logits.argmax(1).tolist() for logits in self(batch.float() / 255))
            nouns, fills = self.config.nouns, self.config.fills
            found += [Verdict(nouns[n], fills[f]) for n, f in zip(noun, fill, strict=True)]
        return found


AnyJudge = TypeVar("AnyJudge", bound=Eye)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Stack RGB pictures of one size into bytes [B, 3, H, W]."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def save_judge(judge: Eye, path: str | Path) -> None:
    """Write the weights as half-precision safetensors, with the config in the metadata."""
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in judge.state_dict().items()
    }
    write_whole(Path(path), save(tensors, metadata={"config": json.dumps(asdict(judge.config))}))


def load_judge(path: str | Path = BUNDLED) -> Judge:
    """Read a judge back, ready to use; a `ValueError` if the file is not one."""
    return read_judge(path, Judge, "evaluate.py judge")


def read_judge(path: str | Path, kind: type[AnyJudge], command: str) -> AnyJudge:
    """Read a judge of the kind that `command` trains; see `load_judge`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no judge at {path}: train one with `{command}`")
    try:
        with safe_open(path, framework="pt") as file:
            fields = json.loads((file.metadata() or {})["config"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        judge = kind(JudgeConfig(**(fields | lists)))
        judge.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a judge of `{command}`: {reason}") from error
    return judge.eval()


# ---- pictures to learn from -------------------------------------------------------------------


@dataclass(frozen=True)
class Renderings:
    """Single-object pictures, bytes [B, 3, H, W], with the index of each one's noun and fill."""

    pictures: Tensor
    nouns: Tensor
    fills: Tensor

    def __len__(self) -> int:
        return len(self.pictures)


def single_objects(split: str, seed: str) -> Iterator[tuple[Image.Image, Verdict]]:
    """Yield Toybox pictures of one object, without end, each with what a judge should say."""
    from dalle1.data.toybox import render
    from dalle1.data.toybox.kinds import scenes

    for scene in scenes(split, seed, "one"):
        yield render(scene, PICTURE_SIZE), Verdict(scene.items[0].noun, scene.items[0].fill)


def render_many(config: JudgeConfig, count: int, split: str, seed: str) -> Renderings:
    """Render `count` pictures of one object into memory."""
    drawn = single_objects(split, seed)
    pictures, nouns, fills = [], [], []
    for _ in tqdm(range(count), desc=f"rendering ({split})", unit="picture", leave=False):
        picture, truth = next(drawn)
        pictures.append(as_tensor([picture]))
        nouns.append(config.nouns.index(truth.noun))
        fills.append(config.fills.index(truth.fill))
    return Renderings(torch.cat(pictures), torch.tensor(nouns), torch.tensor(fills))


def degrade(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Shift, zoom, blur, tint and roughen `images` [B, 3, H, H] in [0, 1], each differently.

    Returns [B, 3, size, size]: what a discrete VAE with 8×8 patches does to a picture, somewhat
    exaggerated. Tints stay within 5 %, far less than lies between two colours of different names.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).mul_(high - low).add_(low)

    count, _, height, _ = images.shape
    sigma = uniform(-0.8, 2.0, count, 1, 1).clamp_(min=0.45)
    zoom = uniform(0.94, 1.06, count, 1, 1)
    turns = torch.arange(size)[:, None] / size * math.tau

    def axis() -> Tensor:  # a place to look at, and a slow wobble of up to two pixels along it
        wave = torch.sin(uniform(1, 3, count, 1, 1) * turns + uniform(0, math.tau, count, 1, 1))
        shift = uniform(-5, 5, count, 1, 1) + uniform(0, 2, count, 1, 1) * wave
        return _resampling(height, size, shift, zoom, sigma)

    down, across = axis(), axis()
    x = down[:, None] @ images @ across[:, None].mT  # [B, 3, size, size]
    block = size * 8 // 128  # one patch of the VAE
    # A third of the pictures keep all their detail; the coarsest blocks only ever shine through.
    kinds = torch.randint(3, (count,), generator=generator)
    share = uniform(-0.5, 1.0, count, 1, 1, 1).clamp_(min=0)
    for kind, (factor, most) in enumerate(((2, 1.0), (4, 0.6), (block, 0.35))):
        chosen = (kinds == kind).nonzero()[:, 0]
        if len(chosen):
            pooled = F.avg_pool2d(x[chosen], factor)
            mode = "nearest" if factor == block else "bilinear"
            coarse = F.interpolate(pooled, (size, size), mode=mode)
            x[chosen] = x[chosen].lerp_(coarse, share[chosen] * most)
    x = x.mul_(uniform(0.95, 1.05, count, 3, 1, 1)).add_(uniform(-0.03, 0.03, count, 1, 1, 1))
    noise = torch.randn(x.shape, generator=generator)
    return x.add_(noise.mul_(uniform(-0.03, 0.04, count, 1, 1, 1).clamp_(min=0))).clamp_(0, 1)


def _resampling(height: int, size: int, shift: Tensor, zoom: Tensor, sigma: Tensor) -> Tensor:
    """Return matrices [B, size, height] that shift, zoom and blur one axis, a Gaussian per row."""
    pixels = torch.arange(height, dtype=torch.float32)
    centre = (height - 1) / 2
    rows = (torch.arange(size) + 0.5) * height / size - 0.5  # where each lies in the original
    # Past the border the outermost pixel repeats.
    source = ((rows[:, None] - centre) * zoom + centre + shift).clamp(0, height - 1)
    weights = ((pixels - source) / sigma).square_().mul_(-0.5).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))


# ---- training ---------------------------------------------------------------------------------


def train_judge(
    config: JudgeConfig,
    data: Renderings,
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    kept: Path | None = None,
) -> Judge:
    """Train a judge from nothing; the same arguments on the same machine give the same weights."""

    def loss(judge: Judge, images: Tensor, chosen: Tensor) -> Tensor:
        noun, fill = judge(images)
        # Mean over the batch, the two questions with equal weight.
        return question(noun, data.nouns[chosen]) + question(fill, data.fills[chosen])

    how: dict[str, Any] = {"steps": steps, "seed": seed, "batch_size": batch_size, "kept": kept}
    return train(Judge, config, data.pictures, loss, **how)


def question(logits: Tensor, answers: Tensor) -> Tensor:
    """Compute what the answers to one question cost, a mean over those above -1: nats."""
    if not (answers >= 0).any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), answers, ignore_index=-1, label_smoothing=0.05)


def train(
    kind: type[AnyJudge],
    config: JudgeConfig,
    pictures: Tensor,
    loss_fn: Callable[[AnyJudge, Tensor, Tensor], Tensor],
    *,
    steps: int,
    seed: int,
    batch_size: int,
    kept: Path | None = None,
) -> AnyJudge:
    """Train a judge on degraded `pictures`; loss_fn is of (judge, images, their indices).

    Where `kept` is given, the state of the training is kept there now and then, until it is done:
    the same call goes on after an interruption. ValueError where it is of another training.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = kind(config).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
    parts: dict[str, Any] = {"judge": judge, "optimizer": optimizer, "schedule": schedule}
    settings = {**asdict(config), "steps": steps, "seed": seed, "batch_size": batch_size}
    settings |= {"pictures": len(pictures), "kind": kind.__name__}
    start = _restored(kept, settings, parts, generator)
    progress = tqdm(range(start, steps), desc="training the judge", unit="step")
    for step in progress:
        if kept and step > start and step % KEEP_EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"settings": settings, "step": step, "generator": generator.get_state()}
            torch.save(state, content := io.BytesIO())
            write_whole(kept, content.getvalue())
        chosen = torch.randint(len(pictures), (batch_size,), generator=generator)
        images = degrade(pictures[chosen].float() / 255, config.image_size, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(judge, images, chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    if kept:
        kept.unlink(missing_ok=True)
    return judge.eval()


def _restored(
    kept: Path | None, settings: dict[str, Any], parts: dict[str, Any], generator: torch.Generator
) -> int:
    """Bring a training to where it was kept; give the step to go on with."""
    if kept is None or not kept.is_file():
        return 0
    state = torch.load(kept, weights_only=True)
    if state["settings"] != settings:
        raise ValueError(f"{kept} is of a training with other settings: remove it, or repeat those")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    return int(state["step"])


@torch.inference_mode()
def answer_in_batches(
    ask: Callable[[Tensor], Sequence[Tensor]], pictures: Tensor, config: JudgeConfig, degraded: bool
) -> list[Tensor]:
    """Give the answer [N] to each question of bytes [N, 3, H, W]; degraded: as in training."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch in pictures.split(64):
        images = batch.float() / 255
        if degraded:
            images = degrade(images, config.image_size, generator)
        found.append([logits.argmax(1) for logits in ask(images)])
    return [torch.cat(answers) for answers in zip(*found)]


def accuracy(
    judge: Judge, split: str, count: int, seed: str, degraded: bool = False
) -> Iterator[tuple[str, float]]:
    """Yield `(name, share)` for noun, fill and both on `count` fresh renderings of a split.

    With `degraded` the pictures are first treated as in training.
    """
    data = render_many(judge.config, count, split, seed)
    nouns, fills = answer_in_batches(judge, data.pictures, judge.config, degraded)
    noun_right, fill_right = nouns == data.nouns, fills == data.fills
    yield "noun", noun_right.float().mean().item()
    yield "fill", fill_right.float().mean().item()
    yield "both", (noun_right & fill_right).float().mean().item()
