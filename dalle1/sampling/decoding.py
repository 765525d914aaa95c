"""Sample image codes: prefill → decode_one or decode_window → generate.

Each caption is read once; then one code after another is sampled for all of its candidates. With
few candidates, windows of codes are computed at once, which samples the same codes in fewer passes:
see `decode_window`.

P prompts, C candidates of each, n codes of a window, L text positions, N = W² codes, D width,
V codebook size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dalle1.devices import cuda_graphed, inference
from dalle1.model.transformer import Transformer
from dalle1.sampling.filters import MIN_TEMPERATURE, PAPER, Sampling, filter_logits
from dalle1.sampling.fused_step import fused
from dalle1.sampling.guidance import (
    Contrasts,
    all_captions,
    likelihood_gain,
    mixed_logits,
    num_captions,
)
from dalle1.sampling.kv_cache import Caches
from dalle1.sampling.packed_linear import packed, restored, weights_of

UNKNOWN = -1
"""Value in known codes of a code that is to be sampled."""
MAX_WINDOW, MIN_WINDOW = {"cpu": 8, "cuda": 32}, 4
"""Codes of a window: more are right so rarely that they cost more than they gain."""
ROWS_OF_A_PASS = {"cpu": 32, "cuda": 128}
"""Rows of a pass, by device, up to which windows are faster; see docs/experiments.md."""
OnRow = Callable[[Tensor, int], None]


def candidate_uniforms(seed: int, candidates: Sequence[int], length: int) -> Tensor:
    """Return each candidate's own random numbers in [0, 1): [C, length].

    They depend on (seed, candidate) alone, so candidate 7 is the same image in any batch.
    """
    streams = [random.Random(f"{seed}/{c}") for c in candidates]
    numbers = [[s.random() for _ in range(length)] for s in streams]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def sample_token(logits: Tensor, uniforms: Tensor, sampling: Sampling = PAPER) -> Tensor:
    """Sample one token a row from softmax(logits / temperature), by inverting its distribution.

    Args:
        logits: [B, V].
        uniforms: [B], in [0, 1].
        sampling: its temperature and filters; guidance is not applied here.

    Returns: [B].
    """
    logits = logits.float()
    if sampling.temperature < MIN_TEMPERATURE:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = filter_logits(logits, sampling).exp().cumsum(-1, dtype=exact)
    total = cumulative[:, -1:].contiguous()
    # A uniform that was rounded to 1 lies beyond all tokens: the last possible one is taken.
    last = torch.searchsorted(cumulative, total)
    target = uniforms.to(cumulative)[:, None] * total
    return torch.searchsorted(cumulative, target, right=True).minimum(last)[:, 0]


@dataclass(kw_only=True)
class DecodeState:
    """Candidates of some captions, sampled up to `position`.

    All tensors are updated in place, so that a CUDA graph can replay `decode_one`.
    """

    model: Transformer
    caches: Caches
    window: int
    """n: codes of each candidate that a pass computes."""
    captions: int
    """B: captions that are read for each prompt, see `dalle1.sampling.guidance`."""
    strengths: Tensor | None
    """[K, P, 1, 1]: of `Contrasts`."""
    sampling: Sampling
    uniforms: Tensor
    """[C, N]: the random number of each candidate at each code."""
    known: Tensor
    """[N]: known codes, and UNKNOWN where they are sampled."""
    codes: Tensor
    """[P, C, N]: known and sampled codes, then UNKNOWN, or the guesses of a window."""
    position: Tensor
    """[1]: index of the last code that was sampled, without windows."""
    front: Tensor
    """[P, C]: number of codes of each candidate that are known or sampled, with windows."""
    finite: Tensor
    """[1], bool: whether the largest logit of every step was finite."""
    gain: Tensor | None
    """[P, C]: nats that the prompt saves of each candidate's codes so far; None: not computed."""

    def continue_from(self, candidates: Tensor) -> None:
        """Let each candidate continue the codes of another, or its own: [P, C]."""
        self.codes.copy_(self.codes.gather(1, candidates[..., None].expand_as(self.codes)))
        if self.gain is not None:
            self.gain.copy_(self.gain.gather(1, candidates))
        self.caches.continue_from(candidates.repeat(self.captions, 1))


class Resample(Protocol):
    """Decides after a row which candidates continue, such as `Resampler`."""

    @property
    def compares(self) -> bool:
        """Whether it reads `DecodeState.gain`."""

    def __call__(self, state: DecodeState, rows: int) -> Tensor | None:
        """Return the candidate that each continues, [P, C]; None where all continue their own."""


def prefill(
    model: Transformer,
    text: Tensor,
    uniforms: Tensor,
    sampling: Sampling,
    known: Tensor,
    empty: Tensor | None = None,
    window: int = 1,
    contrasts: Contrasts | None = None,
    compares: bool = False,
) -> DecodeState:
    """Read captions [P, L] and the codes before the first unknown one, and sample that one.

    Args:
        empty: the caption that guidance leads away from, [1, L]; None is padding throughout.
        compares: whether to compute `DecodeState.gain`.
    """
    prompts, candidates = len(text), len(uniforms)
    model = packed(fused(model), prompts * candidates * window)
    codes = known.repeat(prompts, candidates, 1)
    position = (known == UNKNOWN).nonzero()[:1, 0]
    empty = null_caption(model) if empty is None else empty
    text, strengths = all_captions(text, empty, sampling.guidance, contrasts, compares)
    state = DecodeState(
        model=model,
        caches=Caches(model, len(text), candidates, window),
        window=window,
        captions=len(text) // prompts,
        strengths=strengths,
        sampling=sampling,
        uniforms=uniforms.to(text.device),
        known=known,
        codes=codes,
        position=position,
        front=(position + 1).repeat(prompts, candidates),
        finite=torch.ones(1, dtype=torch.bool, device=text.device),
        gain=torch.zeros(prompts, candidates, device=text.device) if compares else None,
    )
    # The last of these codes is the one to sample; `embed` does not read it.
    first = known[: int(position) + 1].expand(len(text), -1)
    sample_next(state, model.run(model.embed(text, first), state.caches.prefill)[:, -1:])
    return state


def decode_one(state: DecodeState) -> None:
    """Read the codes sampled last, and sample the next of every candidate."""
    model, position = state.model, state.position
    last = state.codes.index_select(2, position)[:, :, 0]
    # The state that reads this code is the code's own without start tokens, else the next one's.
    reads = position + (model.config.image_start != "none")
    position.add_(1)
    state.caches.seek(reads)
    x = model.embed_codes(last.repeat(state.captions, 1), reads)
    sample_next(state, model.run(x, state.caches.step, model.config.text_len + reads))


def sample_next(state: DecodeState, states: Tensor) -> None:
    """Sample from states [P, C, D], or [P, 1, D] that all candidates share, at the position.

    With guidance and weights the states of other captions follow, and P counts all.
    """
    prompts, candidates, _ = state.codes.shape
    every = state.model.image_head(states).float()
    logits = guided_logits(state, every).expand(-1, candidates, -1)
    uniforms = state.uniforms.index_select(1, state.position)[:, 0].expand(prompts, -1)
    tokens = sample_token(logits.flatten(0, 1), uniforms.flatten(), state.sampling)
    known = state.known.index_select(0, state.position)
    tokens = torch.where(known == UNKNOWN, tokens, known).view(prompts, candidates, 1)
    if state.gain is not None:
        state.gain.add_(likelihood_gain(every, tokens[..., 0]))
    state.codes.index_copy_(2, state.position, tokens)


def guided_logits(state: DecodeState, logits: Tensor) -> Tensor:
    """Combine the logits of all captions, [B·P, n, V] → [P, n, V]."""
    compares = state.gain is not None
    logits = mixed_logits(logits, state.sampling.guidance, state.strengths, compares)
    state.finite.logical_and_(logits.amax().isfinite())
    return logits


def decode_window(state: DecodeState) -> None:
    """Compute the next n codes of every candidate from guesses, and keep those that are right.

    With its random numbers fixed, each code is a function of those before it. So a code that was
    computed from right codes is right, and so is each after it, as long as the guesses that it read
    were what came out: Jacobi iteration, whose fixed point is what `decode_one` samples (predictive
    sampling, arXiv 2002.09928). At least one code is right. The others are the next pass's guesses;
    a code without any is guessed to be the one above it, or in the first row the last one.
    """
    model, config, codes, width = state.model, state.model.config, state.codes, state.window
    offsets = torch.arange(width, device=codes.device)
    # A candidate that ends sooner computes its last code again.
    positions = (state.front[..., None] + offsets).clamp_max(config.image_len - 1)  # [P, C, n]
    above, last = positions - config.grid_size, state.front[..., None] - 1
    guesses = codes.gather(2, positions)
    new = codes.gather(2, torch.where(above >= 0, above, last))
    guesses = torch.where(guesses == UNKNOWN, new, guesses)
    codes.scatter_(2, positions, guesses)
    inputs, reads = codes.gather(2, positions - 1), positions
    if config.image_start == "none":
        reads = reads - 1
    if state.captions > 1:
        inputs, reads = (x.repeat(state.captions, 1, 1) for x in (inputs, reads))
    state.caches.seek(reads)
    inputs, reads = inputs.flatten(1), reads.flatten(1)
    states = model.run(model.embed_codes(inputs, reads), state.caches.step, config.text_len + reads)
    logits = guided_logits(state, model.image_head(states).float()).flatten(0, 1)
    uniforms = state.uniforms.expand(len(codes), -1, -1).gather(2, positions)
    tokens = sample_token(logits, uniforms.flatten(), state.sampling).view(positions.shape)
    known = state.known[positions]
    tokens = torch.where(known == UNKNOWN, tokens, known)
    codes.scatter_(2, positions, tokens)
    matching = (tokens == guesses)[..., :-1].cumprod(-1).sum(-1)
    state.front.add_(1 + matching).clamp_max_(config.image_len)


def pick_window(model: Transformer, sequences: int) -> int:
    """Return the codes of a window with which so many sequences are sampled fastest; 1 for none.

    It depends on the device alone, not on a measured time: the same command repeats its rounding.
    """
    device = model.image_head.weight.device.type
    most = min(MAX_WINDOW.get(device, 1), model.config.grid_size)
    window = min(ROWS_OF_A_PASS.get(device, 0) // sequences, most)
    return window if window >= MIN_WINDOW else 1


def generate(
    model: Transformer,
    text: Tensor,
    uniforms: Tensor,
    sampling: Sampling = PAPER,
    *,
    known_codes: Tensor | None = None,
    empty: Tensor | None = None,
    contrasts: Contrasts | None = None,
    on_row: OnRow | None = None,
    window: int | None = None,
    resample: Resample | None = None,
) -> Tensor:
    """Sample codes for captions.

    Args:
        text: [P, L], captions with their padding.
        uniforms: [C, N]: the random number of each candidate at each code.
        known_codes: [N], codes to keep, and UNKNOWN where they are sampled; None samples all.
        empty: the caption that guidance leads away from, [1, L]; None is padding throughout.
        contrasts: the prompts without some of their words, to weight these.
        on_row: called after each row of codes, with the codes [P, C, N] and the number of rows.
        window: codes of each candidate to compute at once, at most W; it changes the time, and
            not the codes. None is the fastest.
        resample: called after each row but the last, see `Resampler`; it excludes windows.

    Returns: [P, C, W, W].
    """
    config = model.config
    check_shapes(model, text, uniforms)
    known = check_known(known_codes, model).to(text.device)
    unknown, grid = (known == UNKNOWN).nonzero(), (config.grid_size, config.grid_size)
    if not len(unknown):
        return known.repeat(len(text), len(uniforms), 1).unflatten(2, grid)
    if resample is not None:
        window = 1
    elif window is None:
        captions = num_captions(sampling.guidance, contrasts)
        window = pick_window(model, captions * len(text) * len(uniforms))
    on_gpu = torch.cuda.device(text.device) if text.is_cuda else nullcontext()
    with inference(text.device), on_gpu, restored(model):
        compares = resample is not None and resample.compares
        state = prefill(model, text, uniforms, sampling, known, empty, window, contrasts, compares)
        if window == 1:
            decode_steps(state, int(unknown[0]), on_row, resample)
        else:
            decode_windows(state, int(unknown[0]), on_row)
    return state.codes.unflatten(2, grid)


def decode_steps(
    state: DecodeState, first: int, on_row: OnRow | None, resample: Resample | None = None
) -> None:
    """Sample the codes after the first unknown one, one position after another."""
    config = state.model.config
    step: Callable[[], None] = partial(decode_one, state)
    if state.codes.is_cuda:
        step = cuda_graphed(step)
    for position in range(first, config.image_len):
        if position > first:
            step()
        if position == first or (position + 1) % config.grid_size == 0:
            check_finite(state)
        row, column = divmod(position + 1, config.grid_size)
        if resample and column == 0 and row < config.grid_size:
            candidates = resample(state, row)
            if candidates is not None:
                state.continue_from(candidates.to(state.codes.device))
        if on_row and column == 0:
            on_row(state.codes, row)


def decode_windows(state: DecodeState, first: int, on_row: OnRow | None) -> None:
    """Sample the codes after the first unknown one, each candidate at its own position."""
    config, rows = state.model.config, first // state.model.config.grid_size
    step: Callable[[], None] = partial(decode_window, state)
    if state.codes.is_cuda:
        step = cuda_graphed(step)
    columns = torch.arange(config.image_len, device=state.codes.device)
    check_finite(state)
    while rows < config.grid_size:
        done = int(state.front.min()) // config.grid_size
        for row in range(rows + 1, done + 1):
            check_finite(state)
            if on_row:  # without the guesses
                is_done = columns < row * config.grid_size
                on_row(torch.where(is_done, state.codes, state.known), row)
        rows = max(rows, done)
        if rows < config.grid_size:
            step()


def check_finite(state: DecodeState) -> None:
    """Raise a ValueError where logits were nan or infinite; a GPU waits for this answer."""
    if not state.finite:
        raise not_finite(state.model, state.sampling.guidance)


def not_finite(model: Transformer, guidance: float) -> ValueError:
    """Return the error of logits that are nan or infinite."""
    dtype = model.text_embedding.weight.dtype
    if not all(weight.isfinite().all() for weight in weights_of(model)):
        remedy = "its weights are damaged or their training diverged, use an earlier checkpoint"
    elif guidance != 1:
        remedy = f"guidance is {guidance:g}, use a smaller one"
        remedy += "" if dtype == torch.float32 else ", or --precision fp32"
    elif dtype != torch.float32:
        remedy = "use --precision fp32"
    else:
        remedy = "its training diverged, use an earlier checkpoint"
    name = str(dtype).removeprefix("torch.")
    return ValueError(
        f"the model's logits are nan or infinite in {name}, expected numbers; {remedy}"
    )


def check_shapes(model: Transformer, text: Tensor, uniforms: Tensor) -> None:
    """Raise a ValueError unless captions and random numbers fit the model."""
    length, width = model.config.text_len, model.config.image_len
    most = model.text_embedding.num_embeddings - 2  # the last is the start token
    if text.ndim != 2 or text.shape[1] != length or not 0 <= text.min() <= text.max() <= most:
        raise ValueError(f"got text {tuple(text.shape)}, expected [P, {length}], 0 to {most}")
    if uniforms.ndim != 2 or uniforms.shape[1] != width:
        raise ValueError(f"got uniforms {tuple(uniforms.shape)}, expected [C, {width}]")


def check_known(known_codes: Tensor | None, model: Transformer) -> Tensor:
    """Return known codes as integers [N]; ValueError if they do not fit the model."""
    length, vocab = model.config.image_len, model.config.codebook_size
    if known_codes is None:
        return torch.full((length,), UNKNOWN)
    is_valid = not known_codes.is_floating_point() and known_codes.shape == (length,)
    if not is_valid or known_codes.min() < UNKNOWN or known_codes.max() >= vocab:
        raise ValueError(
            f"known codes are {tuple(known_codes.shape)} of {known_codes.dtype}, expected "
            f"[{length}] integers from 0 to {vocab - 1}, or {UNKNOWN} where a code is sampled"
        )
    return known_codes.long()


def null_caption(model: Transformer, device: str | torch.device = "cpu") -> Tensor:
    """Return the empty caption, [1, L]: padding at every position."""
    config = model.config
    return torch.arange(config.text_len, device=device)[None] + config.text_vocab
