"""A DALL·E 2 as a StableUnCLIP of diffusers: equal images there, and after reading it back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_images
from tiny_training import DECODER as DECODER_FLAGS
from tiny_training import PRIOR
from tiny_unclip import (
    randomized,
    tiny_clip,
    tiny_stable_unclip,
)

from dalle1 import export
from dalle2 import embedded
from dalle2.decoder import decoder_denoiser
from dalle2.diffusion.samplers import sample
from dalle2.diffusion.schedule import Schedule
from dalle2.exchange import autoencoder as importer
from dalle2.exchange import stable_unclip as command
from dalle2.exchange.autoencoder import write_autoencoder
from dalle2.exchange.stable_unclip import (
    read_stable_unclip,
    write_stable_unclip,
)
from dalle2.ldm_autoencoder import LDMAutoencoder, LDMAutoencoderConfig
from dalle2.pipeline import Unclip
from dalle2.tasks import decoder, prior
from dalle2.unet import UNet

CAPTION = "a red cube"


@pytest.fixture(scope="module")
def model() -> Unclip:
    return tiny_stable_unclip()


@pytest.fixture(scope="module")
def folder(model: Unclip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("exchange") / "pipeline"
    write_stable_unclip(model, found)
    return found


def sampled(model: Unclip) -> list[bytes]:
    candidates = next(model.sample([CAPTION], num_candidates=2, steps=4, guidance=3.0))
    return [candidate.image.tobytes() for candidate in candidates]


def test_images_are_equal_after_writing_and_reading(
    model: Unclip, folder: Path, tmp_path: Path
) -> None:
    z = torch.nn.functional.normalize(torch.randn(1, 32))
    images = [next(model.sample([CAPTION], image_embeddings=x))[0].image for x in (z, -z)]
    assert images[0].tobytes() != images[1].tobytes()
    found = read_stable_unclip(folder, tmp_path / "found")
    assert sampled(found) == sampled(model)
    assert found.info.license == "cc-by-4.0"
    own_clip = ["--clip", str(folder / "clip")]  # the same, by name
    command.main([str(folder), *own_clip, "--out", str(tmp_path / "model")])
    again = Unclip.from_pretrained(tmp_path / "model", device="cpu")
    assert sampled(again) == sampled(model)
    assert again.prior is not None
    assert model.prior is not None
    assert replace(again.prior.config, clip="clip") == model.prior.config


def decoded(decode: Any, z: torch.Tensor, noise: torch.Tensor, guidance: float) -> torch.Tensor:
    """Return the images of a StableUnCLIPImg2ImgPipeline in four steps."""
    decode.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "pt"}
    return decode(prompt=CAPTION, image_embeds=z, latents=noise, **how).images


def decoded_here(
    model: Unclip, z: torch.Tensor, noise: torch.Tensor, guidance: float
) -> torch.Tensor:
    assert model.text is not None
    config, caption = model.decoder.config, model.text([CAPTION])
    denoise = decoder_denoiser(model.decoder, z, caption, guidance=guidance)
    schedule = Schedule(config.schedule, config.times)
    latents = sample(schedule, denoise, lambda: noise, steps=4, sampler="ddim")
    return model.image_tokenizer.decode(latents)


def embedding_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(1, 32, generator=rng))
    return z, torch.randn(1, 4, 4, 4, generator=rng)


@torch.no_grad()
def test_diffusers_decodes_the_same_images(model: Unclip, folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers; `make test` installs it")
    pipe = diffusers.StableUnCLIPPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    shared = ("image_normalizer", "image_noising_scheduler", "tokenizer", "text_encoder")
    parts = {name: pipe.components[name] for name in (*shared, "unet", "scheduler", "vae")}
    tower = pipe.prior_text_encoder  # of which only the dtype is read
    decode = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=None, image_encoder=tower, **parts
    )
    z, noise = embedding_and_noise()
    for guidance in (1.0, 3.0):
        ours = decoded_here(model, z, noise, guidance)
        assert ours.std() > 0.05
        theirs = decoded(decode, z, noise, guidance)
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    sizes = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "prior_guidance_scale": 1.0}
    assert pipe(CAPTION, output_type="pt", **sizes).images.isfinite().all()


@torch.no_grad()
def test_a_pipeline_that_diffusers_wrote_samples_the_same_images_here(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers; `make test` installs it")
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip, other = tiny_clip(embed_dim=32), tiny_clip(seed=1)
    normalizer = StableUnCLIPImageNormalizer(32)
    normalizer.mean[:], normalizer.std[:] = 0.3, torch.rand(32) + 0.5
    length = float((normalizer.mean**2 + normalizer.std**2).sum().sqrt())
    sizes = clip.model.config.vision_config.to_dict()
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**sizes, "projection_dim": 32}))
    own = clip.model.state_dict()
    tower.load_state_dict({name: own[name] for name in tower.state_dict()})
    theirs = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=clip.processor,
        image_encoder=tower,
        image_normalizer=normalizer,
        image_noising_scheduler=diffusers.DDPMScheduler(1, trained_betas=[1e-12]),
        tokenizer=other.tokenizer,
        text_encoder=other.model.text_model,
        unet=randomized(
            diffusers.UNet2DConditionModel(
                sample_size=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(32, 64),
                layers_per_block=2,
                cross_attention_dim=32,
                attention_head_dim=(2, 4),
                class_embed_type="projection",
                projection_class_embeddings_input_dim=64,
            ),
            0.1,
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
        ),
        vae=randomized(
            diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(32, 64),
                sample_size=8,
            ),
            0.1,
        ),
    )
    theirs.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="holds no whole CLIP, expected --clip with that of its"):
        read_stable_unclip(tmp_path / "pipeline", tmp_path / "model")
    tiny_clip(seed=2, embed_dim=32).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is a tower of another CLIP; name its own by --clip"):
        read_stable_unclip(tmp_path / "pipeline", tmp_path / "model", tmp_path / "other")
    clip.save_pretrained(tmp_path / "clip")
    words = ("pipeline", "--clip", "clip", "--out", "model")
    command.main([x if x.startswith("--") else str(tmp_path / x) for x in words])
    model = Unclip.from_pretrained(tmp_path / "model", device="cpu")
    assert model.decoder.config.attention == (4,)
    z, noise = embedding_and_noise()
    for guidance in (1.0, 3.0):
        ours = decoded_here(model, z, noise, guidance)
        assert ours.std() > 0.05
        wanted = decoded(theirs, length * z, noise, guidance)
        torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=0)


def test_a_model_trained_on_such_an_autoencoder_becomes_a_pipeline(tmp_path: Path) -> None:
    """From the commands alone: import, embed, train, export, import again, sample."""
    write_images(tmp_path / "images", 40)
    tiny_clip(embed_dim=32).save_pretrained(tmp_path / "clip")
    config = LDMAutoencoderConfig(image_size=8, width=32, multipliers=(1, 2), blocks=1)
    write_autoencoder(randomized(LDMAutoencoder(config), 0.1), tmp_path / "vae")
    flags = {
        name: str(tmp_path / name) for name in ("vae", "images", "clip", "embedded", "decoder")
    }
    encoder = str(tmp_path / "autoencoder")
    importer.main([flags["vae"], "--out", encoder, "--image-size", "16"])
    models = ["--autoencoder", encoder, "--clip", flags["clip"]]
    data = ["--data", flags["images"], "--out", flags["embedded"], "--num-workers", "0"]
    embedded.main([*models, *data])
    data = ["--data", flags["embedded"], "--clip", flags["clip"], "--steps", "1"]
    stable = ["--model.stable-diffusion", "--model.group-width", "1"]
    text = ["--text-encoders", f"clip-text:{flags['clip']}"]
    sizes = ["--model.width", "32", "--model.attention", "8"]
    words = [*DECODER_FLAGS, *sizes, *data, *models[:2], "--out", flags["decoder"]]
    with pytest.raises(SystemExit):  # the CLIP's own reader reads no padding
        decoder.main([*words, *stable])
    decoder.main([*words, *stable, *text])
    like_karlo = ["--model.mlp", "gelu-erf", "--model.no-qk-norm"]
    prior.main([*PRIOR, *like_karlo, *data, "--out", str(tmp_path / "prior")])
    joined = ["--model", flags["decoder"], "--prior", str(tmp_path / "prior")]
    with torch.no_grad():  # after one update, the U-Net's output is still 0
        weights = UNet.load(flags["decoder"])
        randomized(weights, 0.1).save(Path(flags["decoder"]) / "latest")
    export.main([*joined, "--format", "diffusers", "--out", str(tmp_path / "pipeline")])
    export.main([*joined, "--dtype", "fp32", "--out", str(tmp_path / "model")])
    command.main([str(tmp_path / "pipeline"), "--out", str(tmp_path / "again")])
    before, after = (Unclip.from_pretrained(tmp_path / x, device="cpu") for x in ("model", "again"))
    assert sampled(before) == sampled(after)
    assert before.prior is not None
    assert before.prior.config.errors
    assert before.decoder.null_caption.std() > 0.1  # the states of "", not zeros
    assert before.text is not None
    empty = before.text([""]).states[0]
    torch.testing.assert_close(before.decoder.null_caption, empty)
    tuned = tmp_path / "tuned"  # a decoder that was imported learns further
    again = str(tmp_path / "again")
    out, clip = str(tmp_path / "data"), ["--clip", f"{again}/clip"]
    data = ["--data", flags["images"], "--out", out, "--num-workers", "0"]
    embedded.main(["--autoencoder", again, *clip, *data])
    data = ["--data", out, *clip, "--steps", "1"]
    init = ["--init", again, "--autoencoder", again, "--text-encoders", f"clip-text:{again}/text-0"]
    decoder.main([*DECODER_FLAGS, *data, *init, "--out", str(tuned)])
    found = Unclip.from_pretrained(tuned, device="cpu").decoder
    assert found.config.stable_diffusion
    assert found.config.text_encoders == ("clip-text:text-0",)
    torch.testing.assert_close(found.null_caption, empty)
    torch.testing.assert_close(found.state_dict(), after.decoder.state_dict(), atol=0.01, rtol=0)
