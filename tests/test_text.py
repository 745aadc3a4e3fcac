"""BERT as the text encoder: tokens, masks, the UNet's attention, saving and loading, and parts that do not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator.conditioning import RECORD, save_model, unet_metadata, with_bert
from ddpo_pytorch.generator.from_scratch import build_bert
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, encode_prompts, guided_noise_prediction, load_pipeline
from ddpo_pytorch.generator.text import (
    check_tokens,
    embed,
    encode_tokens,
    load_text_encoder,
    tokenize,
    too_long,
)
from ddpo_pytorch.sampling import Sampler
from ddpo_pytorch.utils.errors import UserError

PROMPTS = [
    "Fundus: The left eye fundus image shows drusen, lens dust.",
    "Fundus: The right eye fundus image shows normal fundus.",
]


def bert(tokens=24):
    torch.manual_seed(1)
    tokenizer, encoder = build_bert(PROMPTS, 32, 2, tokens)
    return tokenizer, encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(2)
    tokenizer, encoder = bert()
    unet = scratch.build_unet((16, 32), (False, True), 32, 8)
    return scratch.assemble(scratch.build_vae((8, 8, 8), 32), encoder, tokenizer, unet.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert-sd")
    save_model(pipe, folder)
    save_file(pipe.unet.state_dict(), folder / "pretrained_unet.safetensors", metadata=unet_metadata(pipe))
    return folder


def test_embeddings_are_berts_own_and_zero_at_padding():
    tokenizer, encoder = bert()
    embeds = embed(tokenizer, encoder, [*PROMPTS, ""])
    assert embeds.shape == (3, 24, 32)
    for row, prompt in zip(embeds, [*PROMPTS, ""], strict=True):
        alone = tokenizer(prompt, return_tensors="pt")  # no padding, no mask
        own = encoder(alone.input_ids).last_hidden_state[0]
        torch.testing.assert_close(row[: len(own)], own, rtol=1e-5, atol=1e-5)
        assert (row[: len(own)] != 0).any(dim=-1).all() and not row[len(own) :].any()


def test_the_tokenizer_says_how_long_prompts_are_and_longer_ones_are_named(caplog):
    tokenizer, _ = bert(tokens=8)
    assert tokenize(tokenizer, PROMPTS).shape == (2, 8)
    assert too_long(tokenizer, ["fundus", *PROMPTS]) == PROMPTS
    assert too_long(tokenizer, []) == []
    check_tokens(tokenizer, ["fundus"])
    assert not caplog.messages
    check_tokens(tokenizer, ["fundus", *PROMPTS], "captions")
    assert caplog.messages == [f"2 captions exceed 8 tokens and are truncated, the first is {PROMPTS[0]!r}"]


def test_an_encoder_is_loaded_from_folders_of_both_kinds(folder, tmp_path):
    tokenizer, encoder = bert()
    tokenizer.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    expected = embed(tokenizer, encoder, PROMPTS)
    for place in (tmp_path, folder):
        torch.testing.assert_close(embed(*load_text_encoder(place, tokens=512), PROMPTS), expected)
    shorter, _ = load_text_encoder(tmp_path, tokens=16)
    assert shorter.model_max_length == 16
    # published checkpoints have an embedding table longer than the vocabulary, and a tokenizer that states no length
    encoder.resize_token_embeddings(len(tokenizer) + 40)
    encoder.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("model_max_length")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded, longer = load_text_encoder(tmp_path)
    assert loaded.model_max_length == 24  # the encoder's positions
    torch.testing.assert_close(embed(loaded, longer, PROMPTS), expected)


@pytest.mark.parametrize("damage", ["absent", "gpt", "vocabulary"])
def test_what_is_no_text_encoder_is_refused(damage, tmp_path):
    tokenizer, encoder = bert()
    if damage != "absent":
        tokenizer.save_pretrained(tmp_path)
        encoder.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    if damage == "gpt":
        config.write_text(json.dumps({"model_type": "gpt2"}))
    if damage == "vocabulary":
        build_bert(["many other words that this encoder never saw, xyzq"], 32, 2, 24)[0].save_pretrained(tmp_path)
        encoder.resize_token_embeddings(10)
        encoder.save_pretrained(tmp_path)
    with pytest.raises(UserError, match={"absent": "tokenizer.json", "gpt": "gpt2", "vocabulary": "tokens"}[damage]):
        load_text_encoder(tmp_path)


def test_the_unet_does_not_see_padding(pipe):
    """What it predicts is what it predicts from the prompt's own tokens without any padding."""
    latents, timestep = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    embeds = encode_prompts(pipe, PROMPTS)
    lengths = [(row != 0).any(dim=-1).sum() for row in embeds]
    together = guided_noise_prediction(pipe.unet, latents, timestep, embeds, None, 1.0)
    for number, length in enumerate(lengths):
        alone = pipe.unet(latents[number][None], timestep, embeds[number][None, :length]).sample[0]
        torch.testing.assert_close(together[number], alone, rtol=1e-4, atol=1e-5)
    shown = embeds.clone()
    shown[:, -1] = 1.0  # a position that is not padding changes the prediction
    assert not torch.allclose(guided_noise_prediction(pipe.unet, latents, timestep, shown, None, 1.0), together)


def test_training_and_sampling_mask_alike(pipe):
    """Of positional and named arguments, with guidance, and through the encoder that is trained."""
    latents, embeds = torch.randn(2, 4, 8, 8), encode_prompts(pipe, PROMPTS)
    named = pipe.unet(latents, torch.tensor(3), encoder_hidden_states=embeds).sample
    torch.testing.assert_close(pipe.unet(latents, torch.tensor(3), embeds).sample, named)
    tokens = tokenize(pipe.tokenizer, PROMPTS)
    torch.testing.assert_close(encode_tokens(pipe.text_encoder, tokens), embeds)
    negative = PromptEmbeddings(pipe).negative
    assert negative.shape == (1, 24, 32) and (negative != 0).any(dim=-1).sum() == 2  # [CLS] and [SEP]
    guided = guided_noise_prediction(pipe.unet, latents, 3, embeds, negative, 3.0)
    empty = pipe.unet(latents, torch.tensor(3), negative[:, :2].expand(2, -1, -1)).sample
    torch.testing.assert_close(guided, empty + 3 * (named - empty), rtol=1e-4, atol=1e-4)


def test_a_saved_model_draws_the_same(pipe, folder):
    again = load_pipeline(folder, unet_path=folder / "pretrained_unet.safetensors")
    assert again.tokenizer.model_max_length == 24
    ours, theirs = (Sampler(one, "ddim", 3, 1.0, 2.0)(PROMPTS, [5, 5]) for one in (pipe, again))
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("damage", ["other", "missing", "unrecorded"])
def test_a_wrong_or_missing_unet_is_refused(folder, tmp_path, damage):
    broken = shutil.copytree(folder, tmp_path / damage)
    weights = next((broken / "unet").glob("*.safetensors"))
    if damage == "other":
        values = load_file(weights)
        values["conv_in.bias"] += 1
        save_file(values, weights, metadata={"format": "pt"})
    else:
        (weights if damage == "missing" else broken / RECORD).unlink()
    named = {"other": weights, "missing": broken / "unet", "unrecorded": RECORD}[damage]
    with pytest.raises(UserError, match=str(named)):
        load_pipeline(broken)


def test_unet_weights_for_another_text_encoder_are_refused(pipe, folder, tmp_path):
    plain = tmp_path / "unet.safetensors"
    save_file(pipe.unet.state_dict(), plain)
    with pytest.raises(UserError, match="for text encoder CLIP.* has BERT"):
        load_pipeline(folder, unet_path=plain)
    torch.manual_seed(3)
    tokenizer = scratch.build_tokenizer(PROMPTS)
    clip = scratch.assemble(pipe.vae, scratch.build_text_encoder(tokenizer, 32, 1), tokenizer, pipe.unet)
    clip.save_pretrained(tmp_path / "clip")
    load_pipeline(tmp_path / "clip", unet_path=plain)
    with pytest.raises(UserError, match="for text encoder BERT .* has CLIP"):
        load_pipeline(tmp_path / "clip", unet_path=folder / "pretrained_unet.safetensors")


def test_bert_takes_the_place_of_clip(tiny_pipeline_dir, folder, tmp_path):
    swapped = with_bert(load_pipeline(tiny_pipeline_dir), folder, 12)
    assert swapped.tokenizer.model_max_length == 12
    assert encode_prompts(swapped, PROMPTS).shape == (2, 12, 32)
    for part in build_bert(PROMPTS, 48, 1, 24):
        part.save_pretrained(tmp_path)
    for other, message in ((tiny_pipeline_dir, "no BERT"), (tmp_path, "width 48, the UNet expects 32")):
        with pytest.raises(UserError, match=message):
            with_bert(load_pipeline(tiny_pipeline_dir), other, 12)
