"""Text encoders: what each reads, what is dropped with a caption, and models that name them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import CAPTIONS, tiny_model
from tiny_unclip import tiny_clip, tiny_decoder, tiny_unclip

from dalle1.clip import Clip
from dalle1.model_files import LFS_POINTER
from dalle1.sampling.generation import GenerationConfig
from dalle1.text.bpe import Tokenizer
from dalle2 import embedded
from dalle2.conditioning import Caption, CaptionReader, TextEncoder
from dalle2.pipeline import Unclip
from dalle2.text_encoders import (
    Cached,
    Concatenated,
    T5Text,
    TransformerText,
    load_text_encoder,
    load_text_encoders,
    stored_names,
)
from dalle2.unet import UNet

TEXTS = ["a red cube", "a blue teapot"]


def t5(width: int = 16, vocabulary: int = 268) -> Any:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5EncoderModel(T5Config(vocab_size=270, **sizes))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.train(CAPTIONS, vocabulary).bpe,
        pad_token="[PAD]",
        eos_token="[END]",
    )
    end = "[END]", tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A [END]", special_tokens=[end]
    )
    return model, tokenizer


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    for part in t5():
        part.save_pretrained(folder)
    return folder


def siglip() -> Clip:
    from transformers import SiglipConfig, SiglipModel

    clip = tiny_clip()
    text = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 12, "projection_size": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    return Clip(model, clip.tokenizer, clip.processor)


def encoder(kind: str, folder: Path) -> TextEncoder:
    if kind == "clip":
        return CaptionReader(tiny_clip())
    if kind == "siglip":
        return CaptionReader(siglip())
    if kind == "t5":
        return load_text_encoder(f"t5:{folder}", "cpu")
    if kind == "dalle":
        model = tiny_model()
        return TransformerText(model.transformer, model.tokenizer)
    return Concatenated([encoder("clip", folder), encoder("dalle", folder)])


KINDS = ["clip", "siglip", "t5", "dalle", "both"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_encoder_reads_captions_one_by_one(kind: str, t5_folder: Path) -> None:
    read = encoder(kind, t5_folder)
    together, alone = read(TEXTS), read(TEXTS[1:])
    assert together.states.shape[2] == read.width
    assert together.embedding.shape == (2, read.embedding_width)
    for found in (together, alone):
        assert not found.states.requires_grad
    mask = alone.mask[0]
    length = int(mask.sum())
    assert int(together.mask[1].sum()) == length > 1
    states = together.states[1, :length], alone.states[0, :length]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.embedding[1], alone.embedding[0], atol=1e-5, rtol=1e-4)
    assert not together.states[0, :3].allclose(together.states[1, :3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_caption_reaches_no_inlet(kind: str, t5_folder: Path) -> None:
    """The null branch depends on x_t alone: not on the caption, its pooled states or its sizes."""
    read = encoder(kind, t5_folder)
    is_sized = kind == "both"
    widths = {"text_width": read.width, "pooled_width": read.embedding_width}
    more = {"text_pool": True, "text_norm": kind == "t5", "size_features": 4 if is_sized else 0}
    model = tiny_decoder(embedding_width=0, text_encoders=[kind], **widths, **more)
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t, keep = torch.tensor([5, 500]), torch.ones(2, dtype=torch.bool)

    def predicted(texts: list[str], keep: torch.Tensor, **changes: Any) -> torch.Tensor:
        caption: Caption = replace(read(texts), **changes)
        with torch.no_grad():
            return model(x, t, model.condition(caption.embedding, caption, keep, keep))

    assert not predicted(TEXTS, keep).allclose(predicted(TEXTS[::-1], keep))
    null = predicted(TEXTS, ~keep)
    assert null.equal(predicted(TEXTS[::-1], ~keep))
    assert not null.allclose(predicted(TEXTS, keep))
    with torch.no_grad():
        other = model(x + 1, t, model.condition(x, read(TEXTS), ~keep, ~keep))
    assert not other.allclose(null)
    # The pooled embedding is an inlet of its own.
    pooled = torch.zeros(2, read.embedding_width)
    assert not predicted(TEXTS, keep, embedding=pooled).allclose(predicted(TEXTS, keep))
    if is_sized:
        large = torch.full((2, 6), 900.0)
        assert not predicted(TEXTS, keep, sizes=large).allclose(predicted(TEXTS, keep))
        assert predicted(TEXTS, ~keep, sizes=large).equal(null)


def test_sizes_are_in_the_order_of_sdxl() -> None:
    """Height before width: original size, crop's top and left, target size (sgm, diffusers)."""
    usual = (640.0, 480.0, 0.0, 0.0, 16.0, 16.0)
    changes = {"embedding_width": 0, "text_encoders": ["clip:x"], "size_features": 4}
    assert tiny_decoder(**changes).config.sizes == (16, 16, 0, 0, 16, 16)
    model = tiny_decoder(**changes, sizes=usual)
    caption = Concatenated([CaptionReader(tiny_clip())])(["a red cube"])
    with torch.no_grad():
        model.caption_vector.weight.zero_()
        model.caption_vector.bias.zero_()
        model.caption_vector.weight[0, 4] = 1.0  # the first feature of the width: cos(1 · width)
        for sizes, width in (
            (torch.tensor([[480.0, 640.0, 3.0, 5.0, 128.0, 256.0]]), 640.0),
            (None, 480.0),
            (torch.full((1, 6), torch.nan), 480.0),
        ):
            found = model.caption_embedding(replace(caption, sizes=sizes))
            assert found is not None
            assert float(found[0, 0]) == pytest.approx(math.cos(width), abs=1e-4)


def test_two_encoders_are_concatenated_by_channel(t5_folder: Path) -> None:
    parts = [encoder("clip", t5_folder), encoder("dalle", t5_folder)]
    found, each = Concatenated(parts)(TEXTS), [part(TEXTS) for part in parts]
    assert found.states.shape[2] == parts[0].width + parts[1].width
    for caption, start in zip(each, (0, parts[0].width), strict=True):
        length, width = caption.states.shape[1:]
        own = caption.states * caption.mask[..., None]
        assert found.states[:, :length, start : start + width].equal(own)
        assert (found.states[:, length:, start : start + width] == 0).all()
    assert found.embedding.equal(each[1].embedding)


def test_captions_are_remembered_within_a_bound() -> None:
    read = CaptionReader(tiny_clip())
    calls: list[str] = []

    class Counting(CaptionReader):
        def encode(self, captions: Any) -> Caption:
            calls.extend(captions)
            return super().encode(captions)

    cached = Cached(Counting(read.clip), most_bytes=3 * read(TEXTS[:1]).states.nbytes)
    first = cached(TEXTS)
    torch.testing.assert_close(first.embedding, read(TEXTS).embedding)
    assert calls == TEXTS
    again = cached(TEXTS[::-1])
    assert calls == TEXTS
    assert again.states.equal(first.states.flip(0))
    cached(["a red star", "a blue star", "a blue cube"])
    assert cached.bytes <= cached.most_bytes
    cached(TEXTS[:1])
    assert calls.count(TEXTS[0]) == 2  # it was forgotten


def with_text(folder: Path, t5_folder: Path) -> Unclip:
    model = tiny_unclip()
    names = (f"t5:{t5_folder}",)
    text = load_text_encoders(names, "cpu")
    widths = {"text_width": text.width, "pooled_width": text.embedding_width, "text_pool": True}
    decoder = tiny_decoder(embedding_width=0, text_encoders=stored_names(names), **widths)
    found = Unclip(model.image_tokenizer, decoder, model.encoder, text=text, clip=model.clip)
    found.generation = GenerationConfig(guidance=3.0)
    found.save_pretrained(folder)
    return found


def test_a_model_folder_has_its_text_encoder(
    tmp_path: Path, t5_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = with_text(tmp_path / "model", t5_folder)
    config = UNet.config_of(tmp_path / "model")
    assert config.text_encoders == ("t5:text-0",)
    assert (tmp_path / "model/text-0/config.json").is_file()
    monkeypatch.setattr("dalle2.pipeline.Encoders.of", lambda *_: config.encoders)
    loaded = Unclip.from_pretrained(tmp_path / "model", device="cpu")
    assert isinstance(loaded.text, Concatenated)
    assert isinstance(loaded.text.encoders[0], T5Text)
    how: Any = {"num_candidates": 2, "steps": 2, "rerank": "none", "weighted": True}
    for prompt in ("a red cube", "a (red:2) cube"):
        codes = [
            torch.stack([c.codes for c in model.candidates(prompt, **how)])
            for model in (saved, loaded)
        ]
        torch.testing.assert_close(*codes)
    for options, message in (
        (
            {"embedding": "caption"},
            "embedding is 'caption', expected none: this decoder",
        ),
        (
            {"image_embeddings": torch.ones(1, 8)},
            "expected none: this decoder reads captions alone",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            loaded.sample(["a"], **options)
    with pytest.raises(ValueError, match="reads no image embedding, expected no prior beside it"):
        loaded.with_parts(tiny_unclip().prior)
    for part in t5(width=20):  # other files in its folder
        part.save_pretrained(tmp_path / "model/text-0")
    message = r"have states and embeddings of \(20, 20\) numbers, the decoder expects \(16, 16\)"
    with pytest.raises(ValueError, match=message):
        Unclip.from_pretrained(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("name", ["t5:/etc", "t5:user/repository", "clip:{0}", "dalle:a/b"])
def test_a_model_loads_no_encoder_from_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"has no text-0, expected the files of the text encoder"):
        load_text_encoders([name.format(tmp_path)], "cpu", tmp_path)


def test_saved_encoders_replace_older_ones(tmp_path: Path, t5_folder: Path) -> None:
    for old in ("text-0", "text-1"):
        (tmp_path / old).mkdir()
        (tmp_path / old / "old.json").touch()
    (tmp_path / "text-2").symlink_to(t5_folder)
    (t5_folder / "notes.md").symlink_to("../private")  # not one of the encoder's files
    names = ["clip:bundled", f"t5:{t5_folder}", f"dalle:{tmp_path / 'dalle'}"]
    tiny_model().save_pretrained(tmp_path / "dalle")
    saved = load_text_encoders(names, "cpu")
    saved.save(tmp_path)
    assert stored_names(names) == ("clip:bundled", "t5:text-1", "dalle:text-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dalle", "text-1", "text-2"]
    assert {path.suffix for path in (tmp_path / "text-1").iterdir()} == {".json", ".safetensors"}
    loaded = load_text_encoders(stored_names(names), "cpu", tmp_path)
    assert saved(TEXTS).states.equal(loaded(TEXTS).states)
    assert saved.digest() == loaded.digest()
    with torch.no_grad():
        loaded.models[1].encoder.final_layer_norm.weight.add_(1)
    assert saved.digest() != loaded.digest()
    assert (t5_folder / "config.json").is_file()
    (t5_folder / "notes.md").unlink()


def test_a_t5_that_cannot_read_all_captions_is_refused(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"cannot load a T5 from {tmp_path} .*{message}"):
            load_text_encoder(f"t5:{tmp_path}", "cpu")

    model, tokenizer = t5()
    tokenizer.pad_token = None
    refused("padding token")
    model, tokenizer = t5()
    tokenizer.add_tokens([f"more{i}" for i in range(9)])
    refused("tokens, expected at most 270")
    model, tokenizer = t5()
    tokenizer.backend_tokenizer.post_processor = None
    refused("")
    (tmp_path / "model.safetensors").write_bytes(LFS_POINTER)
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer"):
        load_text_encoder(f"t5:{tmp_path}", "cpu")
    (tmp_path / "model.safetensors").unlink()
    index = json.dumps({"metadata": {}, "weight_map": {"shared.weight": "../other.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json lists .*, expected names of"):
        load_text_encoder(f"t5:{tmp_path}", "cpu")


def test_encoders_that_cannot_be_loaded_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for name, message in (
        (
            "bundled",
            "text encoder is 'bundled', expected KIND:WHERE with the kind clip, clip-text, ",
        ),
        ("bert:x", "text encoder is 'bert:x', expected KIND:WHERE"),
        (f"t5:{tmp_path}", f"cannot load a T5 from {tmp_path} "),
        ("t5:no/such", "cannot load a T5 from no/such "),
        ("clip:no-such", "no CLIP at no-such"),
        (f"dalle:{tmp_path}/x", "no model at"),
        (f"dalle:{tmp_path}", "no vocabulary at"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_text_encoder(name, "cpu")
        assert "\n" not in str(error.value)


def test_a_model_without_image_embeddings_is_not_manipulated(
    tmp_path: Path, t5_folder: Path
) -> None:
    from dalle2.manipulation import Manipulator

    with pytest.raises(ValueError, match="the decoder reads no image embedding; use one"):
        Manipulator(model=with_text(tmp_path, t5_folder))


def test_the_bundled_transformer_reads_captions() -> None:
    found = load_text_encoder("dalle:bundled", "cpu")(["a red star", "a zebra mug"])
    assert found.states.shape[2] == 256
    assert int(found.mask.sum()) > 4


def test_middle_states_tell_a_word_and_last_states_the_next() -> None:
    captions = ["a red cube", "a red teapot"]  # what follows is alike
    apart = {}
    for kind in ("dalle-middle", "dalle"):
        one, other = load_text_encoder(f"{kind}:bundled", "cpu")(captions).states
        apart[kind] = float((one[2] - other[2]).norm() / one[2].norm())
        torch.testing.assert_close(one[:2], other[:2])
    assert apart["dalle-middle"] > 1.5 * apart["dalle"] > 0


def test_an_empty_caption_has_no_token() -> None:
    model = tiny_model()
    found = TransformerText(model.transformer, model.tokenizer)(["", TEXTS[0]])
    assert found.mask.any(1).tolist() == [False, True]
    assert not found.states[0].any()


def test_of_encoders_side_by_side_none_reads_padding() -> None:
    """A T5 that reads bytes has more tokens than the CLIP, whose padding they make visible."""
    both = Concatenated([CaptionReader(tiny_clip()), T5Text(*t5(vocabulary=256))])
    alone, together = both(TEXTS[:1]), both([TEXTS[0], f"{TEXTS[0]} and {TEXTS[1]}"])
    count = alone.mask.shape[1]
    assert torch.equal(alone.mask[0], together.mask[0, :count])
    torch.testing.assert_close(alone.states[0], together.states[0, :count])


def test_data_are_not_embedded_by_a_siglip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    siglip().save_pretrained(tmp_path / "siglip")
    models = ["--autoencoder", "pixels", "--image-size", "8", "--clip", str(tmp_path / "siglip")]
    with pytest.raises(SystemExit, match="2"):
        embedded.main([*models, "--data", "toybox:2", "--out", str(tmp_path / "out")])
    assert "a SigLIP, expected a CLIP" in " ".join(capsys.readouterr().err.split())
