"""Frozen text encoders that a decoder reads captions by: CLIP, SigLIP, T5, a DALL·E's transformer.

B batch, T tokens of the longest caption, W width of the states, D of the pooled embedding.

One is written KIND:WHERE, where WHERE is a folder, a Hugging Face name or "bundled":

    clip:bundled                  the text tower of a CLIP or SigLIP       (LDM, SDXL)
    clip-text:bundled             the same, with the states of its padding (Stable Diffusion)
    t5:google/t5-v1_1-small       the encoder of a T5                      (Imagen)
    dalle-middle:bundled          the text states of a DALL·E's transformer after half its layers,
                                  offline in place of a T5
    dalle:bundled                 the same after all layers: they tell the next word, more than this

Several are concatenated by channel, as in SDXL.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.clip import Clip
from dalle1.clip.checks import check_weights
from dalle1.clip.loading import quiet_transformers
from dalle1.data.cleaning import clean_prompt
from dalle1.hub import find_model
from dalle1.json_files import parse_json
from dalle1.model.transformer import Transformer
from dalle1.model_files import check_model_files
from dalle1.storage import model_folder
from dalle1.text.bpe import Tokenizer
from dalle2.conditioning import Caption, CaptionReader, TextEncoder

KINDS = ("clip", "clip-text", "t5", "dalle-middle", "dalle")
BUNDLED = "bundled"
MAX_T5_TOKENS = 256
CACHE_BYTES = 256 * 2**20
"""Memory for the states of captions that were read before."""


class HuggingFaceText(TextEncoder):
    """A text tower of transformers and its tokenizer, which are saved together."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.width = self.embedding_width = model.config.hidden_size
        self.models = (self.model,)

    def tokenize(self, captions: Sequence[str], **how: Any) -> tuple[Tensor, Tensor]:
        """Return the tokens of captions and their mask, [B, T] each, on the model's device."""
        inputs = self.tokenizer(list(captions), return_tensors="pt", truncation=True, **how)
        ids, mask = (inputs[k].to(self.model.device) for k in ("input_ids", "attention_mask"))
        return ids, mask

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        model = self.model if dtype is None else copy.deepcopy(self.model).to(dtype)
        with quiet_transformers():
            for part in (model, self.tokenizer):
                part.save_pretrained(folder)


class T5Text(HuggingFaceText):
    """The encoder of a T5; its pooled embedding is the mean state."""

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Caption:
        ids, mask = self.tokenize(captions, max_length=MAX_T5_TOKENS, padding=True)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mask = mask.bool()
        states = states * mask[..., None]
        pooled = states.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return Caption(states, mask, pooled)


class PaddedText(HuggingFaceText):
    """The text tower of a CLIP, which reads every caption as one of full length."""

    @property
    def text_len(self) -> int:
        """Number of positions."""
        return self.model.config.max_position_embeddings

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Caption:
        ids, mask = self.tokenize(captions, max_length=self.text_len, padding="max_length")
        read = self.model(input_ids=ids)  # it is causal: padding changes no token's state
        mask = torch.ones_like(mask, dtype=torch.bool)
        return Caption(read.last_hidden_state.float(), mask, read.pooler_output.float())


class TransformerText(TextEncoder):
    """The text states of a DALL·E's transformer; its pooled embedding is the last token's."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, middle: bool = False) -> None:
        """Keep the model; `middle` states are those after half of its layers, normalized."""
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.middle = middle
        self.width = self.embedding_width = model.config.width
        self.models = (self.model,)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Caption:
        config = self.model.config
        cleaned = [clean_prompt(caption) if caption.strip() else "" for caption in captions]
        device = self.model.text_embedding.weight.device
        text = self.tokenizer.encode(cleaned, config.text_len).to(device)
        x, attends = self.model.embed_text(text), [_causal] * config.depth
        depth = max(1, config.depth // 2) if self.middle else None
        states = self.model.run(x, attends, depth=depth).float()
        states = F.layer_norm(states, (config.width,)) if self.middle else states
        mask = text < config.text_vocab
        if config.image_start != "none":  # state i + 1 is the first that reads token i
            states, mask = states[:, 1:], mask[:, :-1]
        longest = max(1, int(mask.sum(1).max()))
        states, mask = states[:, :longest] * mask[:, :longest, None], mask[:, :longest]
        last = (mask.sum(1) - 1).clamp_min(0)
        return Caption(states, mask, states[torch.arange(len(states)), last])

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.model.save(folder, dtype)
        self.tokenizer.save(folder / "vocab.json")


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Concatenated(TextEncoder):
    """Encoders side by side: states by channel, padded to the longest; the last one's embedding."""

    def __init__(self, encoders: Sequence[TextEncoder], names: Sequence[str] = ()) -> None:
        self.encoders, self.names = encoders, names
        self.width = sum(encoder.width for encoder in encoders)
        self.embedding_width = encoders[-1].embedding_width
        self.models = [model for encoder in encoders for model in encoder.models]

    def encode(self, captions: Sequence[str]) -> Caption:
        read = [encoder.encode(captions) for encoder in self.encoders]
        found, longest = read[0], max(caption.mask.shape[1] for caption in read)
        if len(read) > 1:
            more = [longest - caption.mask.shape[1] for caption in read]
            masks = [F.pad(c.mask, (0, n)) for c, n in zip(read, more, strict=True)]
            states = [F.pad(c.states, (0, 0, 0, n)) for c, n in zip(read, more, strict=True)]
            # Padding of one encoder may be visible by another's tokens, so it becomes 0.
            joined = torch.cat([x * own[..., None] for x, own in zip(states, masks)], -1)
            mask = torch.stack(masks).any(0)
            found = Caption(joined, mask, read[-1].embedding)
        return found

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write all but the bundled ones to text-0, text-1 …, and remove older ones."""
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            made = {}
            for number, (encoder, name) in enumerate(zip(self.encoders, self.names)):
                if not is_bundled(name):
                    unfinished = tempfile.mkdtemp(prefix=f".text-{number}.", dir=folder)
                    stack.callback(shutil.rmtree, unfinished, ignore_errors=True)
                    made[f"text-{number}"] = path = Path(unfinished) / "model"
                    encoder.save(path, dtype)
            for old in folder.glob("text-[0-9]*"):
                old.unlink() if old.is_symlink() else shutil.rmtree(old)
            for name, path in made.items():
                os.replace(path, folder / name)


class Cached(TextEncoder):
    """An encoder that remembers the captions it read, up to some memory.

    Each caption is read alone, so its states depend on no other: a resumed training repeats them.
    """

    def __init__(self, encoder: TextEncoder, most_bytes: int = CACHE_BYTES) -> None:
        self.encoder, self.most_bytes, self.bytes = encoder, most_bytes, 0
        self.width, self.embedding_width = encoder.width, encoder.embedding_width
        self.models = encoder.models
        self.known: OrderedDict[str, Caption] = OrderedDict()

    def encode(self, captions: Sequence[str]) -> Caption:
        found = [self._one(caption) for caption in captions]
        longest = max(caption.mask.shape[1] for caption in found)
        padding = [longest - caption.mask.shape[1] for caption in found]
        return Caption(
            torch.cat([F.pad(c.states, (0, 0, 0, n)) for c, n in zip(found, padding)]),
            torch.cat([F.pad(c.mask, (0, n)) for c, n in zip(found, padding)]),
            torch.cat([c.embedding for c in found]),
        )

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.encoder.save(folder, dtype)

    def _one(self, text: str) -> Caption:
        if text in self.known:
            self.known.move_to_end(text)
            return self.known[text]
        caption = self.encoder.encode([text])
        self.known[text] = caption
        self.bytes += caption.states.nbytes
        while self.bytes > self.most_bytes and len(self.known) > 1:
            self.bytes -= self.known.popitem(last=False)[1].states.nbytes
        return caption


def is_bundled(name: str) -> bool:
    """Whether a text encoder is the bundled one of its kind."""
    return name.partition(":")[2] == BUNDLED


def stored_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names for a model: folders are those in it, such as t5:text-0."""
    found = [name.partition(":") for name in names]
    return tuple(
        f"{kind}:text-{number}" if Path(where).is_dir() else f"{kind}:{where}"
        for number, (kind, _, where) in enumerate(found)
    )


def load_text_encoders(
    names: Sequence[str],
    device: str | torch.device,
    folder: str | Path | None = None,
) -> TextEncoder:
    """Load text encoders, see the top of this file.

    Args:
        folder: model folder whose text-0, text-1 … are loaded; its names may be a stranger's, so
            of them only the bundled ones are.

    Raises: ValueError where one is missing or damaged.
    """
    found = []
    for number, name in enumerate(names):
        own = None
        if folder is not None and not is_bundled(name):
            own = Path(folder) / f"text-{number}"
            if not own.is_dir():
                raise ValueError(
                    f"{folder} has no {own.name}, expected the files of the text encoder {name}; "
                    f"copy them to {own} if you trust them"
                )
        found.append(load_text_encoder(name, device, own))
    return Concatenated(found, names)


def load_text_encoder(
    name: str, device: str | torch.device, folder: Path | None = None
) -> TextEncoder:
    """Load one text encoder, KIND:WHERE, or of that kind from `folder`."""
    kind, has_where, where = name.partition(":")
    if kind not in KINDS or not has_where or not where:
        raise ValueError(
            f"text encoder is {name!r}, expected KIND:WHERE with the kind {', '.join(KINDS)}, such "
            "as clip:bundled"
        )
    if kind == "clip":
        return CaptionReader(Clip.from_pretrained(folder or where, device))
    if kind in ("dalle", "dalle-middle"):
        found = folder or find_model(where)
        vocabulary = Tokenizer.load(found / "vocab.json")
        model = Transformer.load(found, device)
        return TransformerText(model, vocabulary, kind == "dalle-middle")
    if kind == "clip-text":
        own = folder or Path(where)
        if folder is not None or _is_text_tower(own):
            return load_clip_text(own, device)
        clip = Clip.from_pretrained(where, device)
        if clip.model.config.model_type == "siglip":
            raise ValueError(f"{where} is a SigLIP, expected a CLIP for clip-text:")
        return PaddedText(clip.model.text_model, clip.tokenizer)
    return load_t5(folder or where, device)


def _is_text_tower(folder: Path) -> bool:
    """Whether a folder holds the text tower of a CLIP alone, as `PaddedText.save` writes it."""
    file = folder / "config.json"
    return file.is_file() and parse_json(file, dict).get("model_type") == "clip_text_model"


def load_t5(where: str | Path, device: str | torch.device) -> T5Text:
    """Load the encoder of a T5 from a folder or by its Hugging Face name."""
    from transformers import T5EncoderModel

    return T5Text(*_load_text_tower(T5EncoderModel, where, device, "T5"))


def load_clip_text(
    folder: Path, device: str | torch.device, tokenizer: Path | None = None
) -> PaddedText:
    """Load the text tower of a CLIP from a folder that holds no image tower.

    Args:
        tokenizer: folder of its tokenizer; None is the same.

    Raises: ValueError where a folder is missing, damaged, or leads out of itself.
    """
    from transformers import CLIPTextModel

    for part in (folder, tokenizer or folder):
        if not part.is_dir():  # transformers would look for a repository of that name
            raise ValueError(f"no folder {part}, expected a text encoder with its tokenizer")
        check_model_files(part)
    return PaddedText(*_load_text_tower(CLIPTextModel, folder, device, "CLIP", tokenizer))


def _load_text_tower(
    kind: Any, where: str | Path, device: str | torch.device, what: str, named: Path | None = None
) -> tuple[Any, Any]:
    """Load a text tower and its tokenizer from a folder or by their Hugging Face name."""
    from transformers import AutoTokenizer

    folder = model_folder(where)
    name = str(folder if folder.is_dir() else where)
    if folder.is_dir():
        check_weights(folder)
    try:
        with quiet_transformers():
            safely: Any = {"trust_remote_code": False, "local_files_only": folder.is_dir()}
            tokenizer = AutoTokenizer.from_pretrained(str(named or name), **safely)
            model, info = kind.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, **safely
            )
            _check_tokenizer(model, tokenizer)
    except Exception as error:  # transformers and tokenizers raise many kinds
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot load a {what} from {where} ({why}); use a folder or Hugging Face name of a "
            f"{kind.__name__} with its tokenizer"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"the {what} in {where} misses weights ({missing}); copy all of its files")
    return model.to(device), tokenizer


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raise an error where a tokenizer is not that of its model, or cannot read all captions."""
    tokens, vocabulary = len(tokenizer), model.config.vocab_size
    if tokens > vocabulary:
        raise ValueError(f"its tokenizer has {tokens} tokens, expected at most {vocabulary}")
    for captions in ([""], ["a", "a longer caption"]):  # needs an end token, and one for padding
        how = {"padding": True, "truncation": True, "max_length": 8}
        model(input_ids=tokenizer(captions, return_tensors="pt", **how)["input_ids"])
