"""Loading Stable Diffusion, guidance, prompt embeddings, and whole trajectories against diffusers' own pipeline."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.generator.lora import add_lora, lora_parameters
from ddpo_pytorch.generator.pipeline import (
    PromptEmbeddings,
    decode_latents,
    encode_prompts,
    guided_noise_prediction,
    latent_shape,
    load_pipeline,
)
from ddpo_pytorch.utils.errors import UserError

PROMPTS = [
    "a dermoscopic image with melanoma (MEL) showing hair, ink",
    "a dermoscopic image with melanocytic nevus (NV) with no visible artifacts",
]


@pytest.fixture
def pipe(tiny_pipeline_dir):
    return load_pipeline(tiny_pipeline_dir)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_pipeline_is_frozen_and_uses_ddim(tiny_pipeline_dir, dtype):
    pipe = load_pipeline(tiny_pipeline_dir, dtype=dtype)
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.safety_checker is None
    assert pipe.scheduler.alphas_cumprod.dtype == torch.float32
    original = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None).scheduler.config
    for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset"):
        assert pipe.scheduler.config[key] == original[key]
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        assert not part.training and {weight.dtype for weight in part.parameters()} == {dtype}
        assert not any(weight.requires_grad for weight in part.parameters())


def test_missing_models_are_one_clear_line(tmp_path, tiny_pipeline_dir, monkeypatch, caplog):
    asked = []

    def unreachable(model, **kwargs):
        asked.append(model)
        raise OSError("Cannot find the requested files\nand many more lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    moved = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for model, named in (
        (tmp_path / "absent", "absent"),
        ("./here", r"\./here"),
        (tmp_path, r"model_index\.json"),
        ("someone/something", "someone/something"),
        ("runwayml/stable-diffusion-v1-5", moved),  # left the hub and has a mirror
    ):
        with pytest.raises(UserError, match=named) as error:
            load_pipeline(model)
        assert "\n" not in str(error.value)
    assert asked == ["someone/something", moved] and moved in caplog.text


def test_unet_weights_are_replaced_or_refused_by_name(pipe, tiny_pipeline_dir, tmp_path):
    file = tmp_path / "unet.safetensors"
    for _ in range(2):  # a missing file, an unreadable one
        with pytest.raises(UserError, match=str(file)):
            load_pipeline(tiny_pipeline_dir, unet_path=file)
        file.write_bytes(b"garbage")
    weights = {key: value + 0.01 for key, value in pipe.unet.state_dict().items()}
    save_file(weights, file)
    replaced = load_pipeline(tiny_pipeline_dir, unet_path=file).unet.state_dict()
    assert all(torch.equal(replaced[key], weights[key]) for key in weights)
    cases = {
        r"has the key conv_extra\.weight": weights | {"conv_extra.weight": torch.zeros(1)},
        r"lacks the key conv_in\.bias": {key: value for key, value in weights.items() if key != "conv_in.bias"},
        r"conv_in\.bias of shape \(3,\)": weights | {"conv_in.bias": torch.zeros(3)},
    }
    for message, tensors in cases.items():
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            load_pipeline(tiny_pipeline_dir, unet_path=file)


def test_prompt_embeddings_equal_diffusers_and_are_computed_once(pipe, monkeypatch):
    expected, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    embeddings = PromptEmbeddings(pipe)
    torch.testing.assert_close(embeddings(PROMPTS), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encode_prompts(pipe, PROMPTS), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings.negative, negative[:1], rtol=1e-5, atol=1e-5)

    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    again = embeddings([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert torch.equal(again, embeddings(PROMPTS)[[1, 0, 1]])


def test_guidance_combines_two_predictions(pipe):
    latents = torch.randn(3, *latent_shape(pipe), generator=seeded(0))
    timesteps = torch.tensor([901, 401, 1])
    embeddings = PromptEmbeddings(pipe)
    embeds = embeddings([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    with torch.no_grad():
        conditional = pipe.unet(latents, timesteps, encoder_hidden_states=embeds).sample
        unconditional = pipe.unet(
            latents, timesteps, encoder_hidden_states=embeddings.negative.expand(3, -1, -1)
        ).sample
        guided = guided_noise_prediction(pipe.unet, latents, timesteps, embeds, embeddings.negative, 5.0)
        per_sample = guided_noise_prediction(
            pipe.unet, latents, timesteps, embeds, embeddings.negative.expand(3, -1, -1), 5.0
        )
        plain = guided_noise_prediction(pipe.unet, latents, timesteps, embeds, None, 1.0)
    torch.testing.assert_close(guided, 5 * conditional - 4 * unconditional, rtol=1e-4, atol=1e-4)
    assert torch.equal(per_sample, guided)
    assert torch.equal(plain, conditional)
    with pytest.raises(ValueError, match="needs negative_prompt_embeds"):
        guided_noise_prediction(pipe.unet, latents, timesteps, embeds, None, 5.0)


def test_decoded_images_are_floats_in_range(pipe):
    latents = 3 * torch.randn(2, *latent_shape(pipe), generator=seeded(0))
    images = decode_latents(pipe, latents)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(images, pipe.image_processor.postprocess(decoded, "pt"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("eta", "guidance", "negative"), [(0.0, 5.0, None), (1.0, 5.0, None), (1.0, 1.0, None), (0.6, 3.0, "hair")]
)
def test_images_equal_those_of_diffusers(pipe, eta, guidance, negative):
    latents = torch.randn(2, *latent_shape(pipe), generator=seeded(0))
    common = {"latents": latents, "num_inference_steps": 5, "guidance_scale": guidance, "eta": eta}
    expected = pipe(
        PROMPTS, negative_prompt=negative and [negative] * 2, generator=seeded(1), output_type="pt", **common
    ).images
    images, nsfw, all_latents, log_probs = pipeline_with_logprob(
        pipe, PROMPTS, negative_prompt=negative, generator=seeded(1), **common
    )
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert nsfw is None
    assert len(all_latents) == 6 and len(log_probs) == 5 and torch.equal(all_latents[0], latents)
    assert all((log_prob is None) if eta == 0 else (log_prob.shape == (2,)) for log_prob in log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_update_scores_the_trajectory_as_the_rollout_did(tiny_pipeline_dir, dtype):
    """Ratio 1 before the first update, with adapters in place: exact, and the same in half precision."""
    pipe = load_pipeline(tiny_pipeline_dir, dtype=dtype)
    add_lora(pipe.unet, 4, ("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(pipe.unet):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
    embeds, negative = PromptEmbeddings(pipe)(PROMPTS), PromptEmbeddings(pipe).negative
    _, _, latents, log_probs = pipeline_with_logprob(
        pipe,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        num_inference_steps=4,
        guidance_scale=5.0,
        eta=1.0,
        generator=[seeded(1), seeded(2)],
    )
    assert {tensor.dtype for tensor in latents} == {dtype}
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        prediction = guided_noise_prediction(pipe.unet, latents[step], timestep.repeat(2), embeds, negative, 5.0)
        assert prediction.dtype == torch.float32 and prediction.requires_grad
        _, log_prob = ddim_step_with_logprob(
            pipe.scheduler, prediction, timestep.repeat(2), latents[step], 1.0, prev_sample=latents[step + 1]
        )
        assert torch.equal(log_prob.detach(), log_probs[step])


def test_options_of_the_trajectory(pipe):
    def generate(**changes):
        return pipeline_with_logprob(pipe, PROMPTS[0], num_inference_steps=2, eta=1.0, generator=seeded(0), **changes)

    images, _, latents, log_probs = generate(keep_trajectory=False)
    assert latents == log_probs == [] and not images.requires_grad
    full, _, trajectory, _ = generate()
    assert torch.equal(full, images)
    assert torch.equal(generate(output_type="latent")[0], trajectory[-1])
    (picture,) = generate(output_type="pil")[0]
    assert isinstance(picture, Image.Image)
    array = generate(output_type="np")[0]
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), images)

    factor = pipe.vae_scale_factor
    wide = generate(width=8 * factor, height=4 * factor)[0]
    assert wide.shape[-2:] == (4 * factor, 8 * factor)


def test_contradictory_arguments_are_refused(pipe):
    embeds = encode_prompts(pipe, PROMPTS)
    cases = [
        ({}, "exactly one of prompt"),
        ({"prompt": PROMPTS, "prompt_embeds": embeds}, "exactly one of prompt"),
        (
            {"prompt": PROMPTS, "negative_prompt": "", "negative_prompt_embeds": embeds},
            "exactly one of negative_prompt",
        ),
        ({"prompt": PROMPTS, "height": 63}, "height is 63"),
        ({"prompt": PROMPTS, "output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"prompt": PROMPTS, "generator": [seeded(0)]}, "1 generators for a batch of 2"),
        ({"prompt": PROMPTS, "eta": -1.0}, "eta is -1"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            pipeline_with_logprob(pipe, num_inference_steps=2, **arguments)
