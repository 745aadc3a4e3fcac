"""Loading Stable Diffusion, guidance, prompt embeddings, and whole trajectories against diffusers' own pipeline."""

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from refusals import refused
from safetensors.torch import save_file
from tiny_unet import randomize
from transformers import AutoConfig

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.generator import pipeline
from ddpo_pytorch.generator.lora import add_lora
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, decode_latents, encode_prompts, load_pipeline

PROMPTS = [CAPTIONS[5], CAPTIONS[16]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_decoding_a_few_at_once_and_again_in_float32(pipe, tiny_pipeline_dir, monkeypatch):
    latents, decode, sizes = torch.randn(5, 4, 16, 16, generator=seeded(0)), pipe.vae.decode, []
    together = decode_latents(pipe.vae, latents)
    monkeypatch.setattr(pipe.vae, "decode", lambda part, **how: sizes.append(len(part)) or decode(part, **how))
    monkeypatch.setattr(pipeline, "DECODED_AT_ONCE", 2 * 16 * 16 + 1)
    torch.testing.assert_close(decode_latents(pipe.vae, latents), together, rtol=0, atol=1e-5)
    assert sizes == [2, 2, 1]

    half = load_pipeline(tiny_pipeline_dir, dtype=torch.bfloat16).vae
    broken = torch.where(torch.arange(5)[:, None, None, None] == 3, torch.nan, together)
    assert pipeline.finite_images(half, together, latents) is together
    with torch.autocast("cpu", torch.bfloat16):
        mended = pipeline.finite_images(half, broken, latents)
        from_float32 = pipeline.finite_images(pipe.vae, broken, latents)  # decoded in half precision all the same
    expected = decode_latents(load_pipeline(tiny_pipeline_dir, dtype=torch.bfloat16).vae.float(), latents)
    torch.testing.assert_close(mended, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(from_float32, together, rtol=0, atol=1e-5)
    assert half.dtype == torch.bfloat16


def test_loaded_pipeline_is_frozen_and_uses_ddim(tiny_pipeline_dir):
    pipe = load_pipeline(tiny_pipeline_dir, dtype=torch.bfloat16)
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.safety_checker is None
    assert pipe.scheduler.alphas_cumprod.dtype == torch.float32
    assert pipe.scheduler.config["beta_start"] == 0.00085 and pipe.scheduler.config["steps_offset"] == 1
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        assert not part.training and {weight.dtype for weight in part.parameters()} == {torch.bfloat16}
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
        refused(named, load_pipeline, model)
    assert asked == ["someone/something", moved] and moved in caplog.text


def test_unet_weights_are_replaced_or_refused_by_name(pipe, tiny_pipeline_dir, tmp_path):
    file = tmp_path / "unet.safetensors"
    refused(str(file), load_pipeline, tiny_pipeline_dir, unet_path=file)
    weights = {key: value + 0.01 for key, value in pipe.unet.state_dict().items()}
    save_file(weights, file)
    replaced = load_pipeline(tiny_pipeline_dir, unet_path=file).unet.state_dict()
    assert all(torch.equal(replaced[key], weights[key]) for key in weights)
    few = {key: value for key, value in weights.items() if key != "conv_in.bias"}
    for message, tensors in (
        (r"conv_extra\.weight, which the model lacks", weights | {"conv_extra.weight": torch.zeros(1)}),
        (r"lacks conv_in\.bias", few),
        (r"conv_in\.bias of shape \(3,\)", few | {"conv_in.bias": torch.zeros(3)}),
    ):
        save_file(tensors, file)
        refused(message, load_pipeline, tiny_pipeline_dir, unet_path=file)


def test_prompt_embeddings_equal_diffusers_and_are_computed_once(pipe, monkeypatch):
    expected, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    embeddings = PromptEmbeddings(pipe)
    torch.testing.assert_close(embeddings(PROMPTS), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encode_prompts(pipe, PROMPTS), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings.negative, negative[:1], rtol=1e-5, atol=1e-5)

    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    assert torch.equal(embeddings([PROMPTS[1], PROMPTS[0], PROMPTS[1]]), embeddings(PROMPTS)[[1, 0, 1]])
    monkeypatch.undo()
    embeddings.precompute(PROMPTS)
    refused("'a dog'", embeddings, ["a dog"])


@pytest.mark.parametrize(("eta", "guidance", "negative"), [(0.0, 5.0, None), (1.0, 1.0, None), (0.6, 3.0, "hair")])
def test_images_equal_those_of_diffusers(pipe, eta, guidance, negative):
    latents = torch.randn(2, *pipeline.latent_shape(pipe), generator=seeded(0))
    common = {"latents": latents, "num_inference_steps": 5, "guidance_scale": guidance, "eta": eta}
    given = {"negative_prompt": negative and [negative] * 2, "generator": seeded(1), "output_type": "pt"} | common
    expected = pipe(PROMPTS, **given).images
    given |= {"negative_prompt": negative, "generator": seeded(1)}
    images, nsfw, all_latents, log_probs = pipeline_with_logprob(pipe, PROMPTS, **given)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert nsfw is None and len(all_latents) == 6 and len(log_probs) == 5 and torch.equal(all_latents[0], latents)
    assert all((log_prob is None) if eta == 0 else (log_prob.shape == (2,)) for log_prob in log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_update_scores_the_trajectory_as_the_rollout_did(tiny_pipeline_dir, dtype):
    """Ratio 1 before the first update, with adapters in place: exact, and the same in half precision."""
    pipe = load_pipeline(tiny_pipeline_dir, dtype=dtype)
    add_lora(pipe.unet, 4, ("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    randomize(pipe.unet)
    embeds, negative = PromptEmbeddings(pipe)(PROMPTS), PromptEmbeddings(pipe).negative
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "guidance_scale": 5.0, "eta": 1.0}
    noise = [seeded(1), seeded(2)]
    _, _, latents, log_probs = pipeline_with_logprob(pipe, **given, num_inference_steps=4, generator=noise)
    assert {tensor.dtype for tensor in latents} == {dtype}
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        before, after, both = latents[step], latents[step + 1], timestep.repeat(2)
        prediction = pipeline.guided_noise_prediction(pipe.unet, before, both, embeds, negative, 5.0)
        assert prediction.dtype == torch.float32 and prediction.requires_grad
        _, log_prob = ddim_step_with_logprob(pipe.scheduler, prediction, both, before, 1.0, prev_sample=after)
        assert torch.equal(log_prob.detach(), log_probs[step])


def test_options_of_the_trajectory_and_contradictory_arguments(pipe):
    def generate(**changes):
        return pipeline_with_logprob(pipe, PROMPTS[0], num_inference_steps=2, eta=1.0, generator=seeded(0), **changes)

    images, _, latents, log_probs = generate(keep_trajectory=False)
    assert latents == log_probs == [] and not images.requires_grad
    full, _, trajectory, _ = generate()
    assert torch.equal(full, images) and torch.equal(generate(output_type="latent")[0], trajectory[-1])
    assert isinstance(generate(output_type="pil")[0][0], Image.Image)
    torch.testing.assert_close(torch.from_numpy(generate(output_type="np")[0]).permute(0, 3, 1, 2), images)
    assert generate(width=32, height=16)[0].shape[-2:] == (16, 32)
    embeds = encode_prompts(pipe, PROMPTS)
    for arguments, message in (
        ({}, "either `prompt` or `prompt_embeds`"),
        ({"prompt": PROMPTS, "prompt_embeds": embeds}, "both `prompt`"),
        ({"prompt": PROMPTS, "negative_prompt": "", "negative_prompt_embeds": embeds}, "both `negative_prompt`"),
        ({"prompt": PROMPTS, "height": 63}, "63"),
        ({"prompt": PROMPTS, "output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"prompt": PROMPTS, "generator": [seeded(0)]}, "length 1.*batch size of 2"),
        ({"prompt": PROMPTS, "eta": -1.0}, "eta is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline_with_logprob(pipe, num_inference_steps=2, **arguments)
