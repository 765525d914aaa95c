"""What a model computes as images: codes, bits per code, and what an attention layer sees."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dalle1.devices import inference
from dalle1.model.masks import joint_mask
from dalle1.pipeline import DallE

SIDE = 640
"""Side of a plotted image in pixels."""
STRIP = 20
"""Height of the strip above it that shows the text tokens, with a gap."""


def codes_image(codes: Tensor, codebook_size: int) -> Image.Image:
    """Plot codes [W, W] as a grid: one hue per code, with its number where that is legible."""
    width = len(codes)
    cell = SIDE // width
    image = Image.new("RGB", (cell * width, cell * width))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(max(6, cell // 2 - 1))
    for row, numbers in enumerate(codes.tolist()):
        for column, number in enumerate(numbers):
            # The golden ratio spreads the hues of neighbouring numbers.
            hue = number * 0.618034 % 1
            colour = colorsys.hls_to_rgb(hue, 0.45 + 0.3 * number / codebook_size, 0.6)
            box = (column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1)
            pen.rectangle(box, fill=tuple(int(255 * part) for part in colour))
            if cell >= 16:
                middle = (column + 0.5) * cell, (row + 0.5) * cell
                pen.text(middle, str(number), fill="black", font=font, anchor="mm")
    return image


@torch.inference_mode()
def bits_per_code(model: DallE, prompt: str, codes: Tensor) -> Tensor:
    """Return the bits that each code costs under a prompt, [W, W]; an empty one is no caption."""
    text = model.encode_prompt(prompt) if prompt else model.empty_caption()[0]
    with inference(model.device):
        _, losses = model.transformer.losses(
            text[None].to(model.device), codes[None].to(model.device)
        )
    return losses[0].float().cpu().view(codes.shape) / torch.log(torch.tensor(2.0))


def heat_map(values: Tensor, image: Image.Image, highest: float | None = None) -> Image.Image:
    """Overlay an image with values [W, W]: blue is 0, red is `highest`, by default the largest."""
    top = float(values.max()) if highest is None else highest
    share = (values / max(top, 1e-9)).clamp(0, 1)
    red, blue = share, 1 - share
    green = 0.6 * (1 - (2 * share - 1).abs())
    colours = (torch.stack([red, green, blue], -1) * 255).to(torch.uint8)
    layer = Image.fromarray(colours.numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB").resize((SIDE, SIDE)), layer, 0.6)


def attended(model: DallE, layer: int, row: int, column: int) -> tuple[Tensor, Tensor]:
    """Return what a position of the grid sees: text [L] and codes [W, W], as booleans.

    The position is the one whose code is predicted from there on: it sees itself, and what its
    layer's mask allows before it.
    """
    config = model.transformer.config
    kinds = config.mask_kinds
    if not 0 <= layer < len(kinds):
        raise ValueError(f"layer is {layer}, expected 0 to {len(kinds) - 1}")
    width = config.grid_size
    if not (0 <= row < width and 0 <= column < width):
        raise ValueError(f"position is ({row}, {column}), expected 0 to {width - 1} each")
    mask = joint_mask(kinds[layer], config.text_len, width, config.conv_wrap)
    sees = mask[config.text_len + row * width + column]
    return sees[: config.text_len], sees[config.text_len :].view(width, width)


def attended_image(
    text: Tensor, codes: Tensor, position: tuple[int, int], image: Image.Image
) -> Image.Image:
    """Plot what a position sees: lit codes over a darkened image, the text as a strip above."""
    width = len(codes)
    cell = SIDE // width
    side = cell * width
    shown = image.convert("RGB").resize((side, side))
    lit = Image.fromarray((codes * 255).to(torch.uint8).numpy()).resize(
        (side, side), Image.Resampling.NEAREST
    )
    dark = Image.blend(shown, Image.new("RGB", shown.size, "black"), 0.75)
    plotted = Image.composite(shown, dark, lit)
    pen = ImageDraw.Draw(plotted)
    row, column = position
    box = (column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1)
    pen.rectangle(box, outline="red", width=max(2, cell // 6))
    strip = Image.fromarray((text[None] * 160 + 60).to(torch.uint8).numpy()).resize(
        (side, STRIP - 4), Image.Resampling.NEAREST
    )
    page = Image.new("RGB", (side, side + STRIP), "white")
    page.paste(strip, (0, 0))
    page.paste(plotted, (0, STRIP))
    return page


def position_at(x: int, y: int, width: int) -> tuple[int, int]:
    """Return the row and column at a pixel of what `attended_image` plotted for a grid."""
    cell = SIDE // width
    row, column = ((pixel - offset) // cell for pixel, offset in ((y, STRIP), (x, 0)))
    return min(max(row, 0), width - 1), min(max(column, 0), width - 1)


def layer_names(kinds: Sequence[str]) -> list[str]:
    """Return a name for each layer, such as "3: column"."""
    return [f"{number}: {kind}" for number, kind in enumerate(kinds)]
