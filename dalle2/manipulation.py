"""What an image's embedding is good for: variations, interpolations and text diffs (paper §3).

An image is the pair (z_i, x_T): its CLIP embedding, and the noise from which DDIM under z_i makes
the image again. z_i holds what CLIP sees, x_T the rest. So one can change and the other stay.

N images, D width of embeddings, c h w latents of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle1.data.crops import centre_square
from dalle1.data.images import to_float, to_rgb, to_tensor
from dalle1.devices import inference
from dalle2.decoder import decoder_denoiser
from dalle2.diffusion.guidance import Denoise
from dalle2.diffusion.noise import CandidateNoise
from dalle2.diffusion.samplers import ddim, ddim_inverse
from dalle2.diffusion.schedule import Schedule
from dalle2.pipeline import Unclip

NO_CAPTION = ""


@dataclass(frozen=True)
class Inverted:
    """Images as embeddings and noise."""

    embedding: Tensor
    """[N, D]: z_i, unit vectors."""
    noise: Tensor
    """[N, c, h, w]: x_T."""


@dataclass(frozen=True, kw_only=True)
class Manipulator:
    """Changes images by a decoder that is told an embedding, and no caption."""

    model: Unclip
    steps: int = 50
    """Steps of DDIM, from 1 to the decoder's number of times."""

    def __post_init__(self) -> None:
        if not self.model.decoder.config.embedding_width:
            raise ValueError(
                "the decoder reads no image embedding; use one of the presets small, base or paper"
            )

    def invert(self, images: Sequence[Image.Image]) -> Inverted:
        """Return the embeddings of images, cut to their central squares, and their noise."""
        autoencoder, size = self.model.image_tokenizer, self.model.image_tokenizer.image_size
        squares = [centre_square(to_rgb(image), size, allow_upscale=True) for image in images]
        pixels = torch.stack([to_float(to_tensor(square)) for square in squares])
        with inference(self.model.device):
            z = self.model.encoder.embed_images(squares).to(self.model.device)
            latents = autoencoder.encode(pixels.to(self.model.device))
            denoise, schedule = self._denoiser(z), self._schedule()
            noise = ddim_inverse(schedule, denoise, latents, schedule.steps(self.steps))
        return Inverted(z, noise)

    def restore(self, inverted: Inverted, eta: float = 0.0, seed: int = 0) -> list[Image.Image]:
        """Return the images of embeddings and noise.

        Args:
            eta: noise that DDIM adds, from 0 to 1; 0 adds none.
            seed: random seed of that noise; image i has its own.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta:g}, expected 0 to 1")
        x, schedule = inverted.noise, self._schedule()
        fresh = CandidateNoise(seed, range(len(x)), x.shape[1:], "variation", x.device)
        with inference(self.model.device):
            denoise, steps = self._denoiser(inverted.embedding), schedule.steps(self.steps)
            return self.model.decode(ddim(schedule, denoise, x, steps, fresh, eta))

    def vary(
        self, image: Image.Image, count: int, eta: float = 1.0, seed: int = 0
    ) -> list[Image.Image]:
        """Return variations of an image: what CLIP sees stays, the rest changes with `eta`."""
        one = self.invert([image])
        many = Inverted(_repeat(one.embedding, count), _repeat(one.noise, count))
        return self.restore(many, eta, seed)

    def blend(
        self, a: Image.Image, b: Image.Image, count: int, noise_seed: int | None = None
    ) -> list[Image.Image]:
        """Return `count` images from a to b, both included.

        Args:
            noise_seed: None interpolates x_T as well, so that the ends are a and b; a seed takes
                one noise for all images.
        """
        ends = self.invert([a, b])
        shares = torch.linspace(0, 1, count, device=ends.noise.device)
        z = slerp(ends.embedding[:1], ends.embedding[1:], shares)
        noise = slerp(ends.noise[:1], ends.noise[1:], shares)
        if noise_seed is not None:
            shape = ends.noise.shape[1:]
            noise = _repeat(CandidateNoise(noise_seed, [0], shape, "blend", z.device)(), count)
        return self.restore(Inverted(z, noise))

    def edit(
        self, image: Image.Image, before: str, after: str, count: int, strength: float = 0.5
    ) -> list[Image.Image]:
        """Return `count` images that change from what `before` describes to what `after` does.

        The embedding turns towards the difference of the captions' embeddings, from not at all to
        the share `strength` of the way; x_T stays. Paper: strengths of 0.25 to 0.5.

        Raises: ValueError where the captions have the same embedding.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength:g}, expected 0 to 1")
        one = self.invert([image])
        old, new = self.model.encoder.embed_text([before, after]).to(one.embedding).split(1)
        if torch.allclose(old, new, atol=1e-6):
            raise ValueError(
                f"the CLIP reads {before!r} and {after!r} alike, expected a difference"
            )
        shares = torch.linspace(0, strength, count, device=one.noise.device)
        z = slerp(one.embedding, F.normalize(new - old, dim=-1), shares)
        return self.restore(Inverted(z, _repeat(one.noise, count)))

    def _denoiser(self, z: Tensor) -> Denoise:
        read = self.model.text or self.model.read
        caption = read([NO_CAPTION]).repeat(len(z))
        keep = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        return decoder_denoiser(self.model.decoder, z, caption, keep_caption=keep)

    def _schedule(self) -> Schedule:
        return Schedule(self.model.decoder.config.schedule, self.model.decoder.config.times)


def _repeat(x: Tensor, count: int) -> Tensor:
    return x.expand(count, *x.shape[1:])


def slerp(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """Interpolate on the sphere from a to b, [1, …] each, by shares [N]: [N, …].

    The length is interpolated as well. Vectors of the same direction are interpolated linearly.
    """
    shares = shares.view(-1, *[1] * (a.ndim - 1))
    lengths = a.norm(), b.norm()
    cosine = ((a * b).sum() / (lengths[0] * lengths[1])).clamp(-1, 1)
    angle = cosine.acos()
    if angle.sin() < 1e-4:
        return a + shares * (b - a)
    of_a, of_b = ((1 - shares) * angle).sin() / angle.sin(), (shares * angle).sin() / angle.sin()
    length = lengths[0] + shares * (lengths[1] - lengths[0])
    return length * (of_a * a / lengths[0] + of_b * b / lengths[1])
