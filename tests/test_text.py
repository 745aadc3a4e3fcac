"""BERT as the text encoder: tokens, masks, the UNet's attention, saving and loading, and parts that do not fit."""

import json
import shutil

import pytest
import torch
from judge_tools import FUNDUS_PROMPTS as PROMPTS
from refusals import refused
from safetensors.torch import load_file, save_file

from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator import pipeline
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, encode_prompts, guided_noise_prediction, load_pipeline
from ddpo_pytorch.generator.text import check_tokens, embed, encode_tokens, load_text_encoder, tokenize, too_long
from ddpo_pytorch.sampling import Sampler
from ddpo_pytorch.training.checkpoints import UNET_FILE, load_weights, save_checkpoint, snapshot


@pytest.fixture
def pipe(bert_pipeline_dir):
    return load_pipeline(bert_pipeline_dir)


def test_embeddings_are_berts_own_and_zero_at_padding(pipe):
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    embeds = embed(tokenizer, encoder, [*PROMPTS, ""])
    assert embeds.shape == (3, 24, 32)
    for row, prompt in zip(embeds, [*PROMPTS, ""], strict=True):
        alone = tokenizer(prompt, return_tensors="pt")  # no padding, no mask
        own = encoder(alone.input_ids).last_hidden_state[0]
        torch.testing.assert_close(row[: len(own)], own, rtol=1e-5, atol=1e-5)
        assert (row[: len(own)] != 0).any(dim=-1).all() and not row[len(own) :].any()


def test_the_tokenizer_says_how_long_prompts_are_and_longer_ones_are_named(caplog):
    tokenizer, _ = scratch.build_bert(PROMPTS, 32, 1, 8)
    assert tokenize(tokenizer, PROMPTS).shape == (2, 8)
    assert too_long(tokenizer, ["fundus", *PROMPTS]) == [*PROMPTS] and too_long(tokenizer, []) == []
    check_tokens(tokenizer, ["fundus"])
    assert not caplog.messages
    check_tokens(tokenizer, ["fundus", *PROMPTS], "captions")
    assert caplog.messages == [f"2 captions exceed 8 tokens and are truncated, the first is {PROMPTS[0]!r}"]


def test_an_encoder_is_loaded_from_folders_of_both_kinds_and_others_are_refused(pipe, bert_pipeline_dir, tmp_path):
    refused(r"tokenizer\.json", load_text_encoder, tmp_path)
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    expected = embed(tokenizer, encoder, PROMPTS)
    # published checkpoints have an embedding table longer than the vocabulary, and a tokenizer that states no length
    encoder.resize_token_embeddings(len(tokenizer) + 40)
    for part in (tokenizer, encoder):
        part.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("model_max_length")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for place in (tmp_path, bert_pipeline_dir):
        loaded, encoder = load_text_encoder(place, tokens=512)
        assert loaded.model_max_length == 24  # the encoder's positions
        torch.testing.assert_close(embed(loaded, encoder, PROMPTS), expected)
    assert load_text_encoder(tmp_path, tokens=16)[0].model_max_length == 16
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    refused("gpt2", load_text_encoder, tmp_path)


def test_the_unet_does_not_see_padding(pipe):
    """It predicts what it predicts from the prompt's own tokens, in training and sampling alike, with guidance too."""
    latents, timestep = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    embeds, negative = encode_prompts(pipe, PROMPTS), PromptEmbeddings(pipe).negative
    torch.testing.assert_close(encode_tokens(pipe.text_encoder, tokenize(pipe.tokenizer, PROMPTS)), embeds)
    together = guided_noise_prediction(pipe.unet, latents, timestep, embeds, None, 1.0)
    for number, row in enumerate(embeds):
        length = (row != 0).any(dim=-1).sum()
        alone = pipe.unet(latents[number][None], timestep, row[None, :length]).sample[0]
        torch.testing.assert_close(together[number], alone, rtol=1e-4, atol=1e-5)
    assert (negative != 0).any(dim=-1).sum() == 2  # [CLS] and [SEP]
    guided = guided_noise_prediction(pipe.unet, latents, timestep, embeds, negative, 3.0)
    empty = pipe.unet(latents, timestep, negative[:, :2].expand(2, -1, -1)).sample
    torch.testing.assert_close(guided, empty + 3 * (together - empty), rtol=1e-4, atol=1e-4)
    embeds[:, -1] = 1.0  # a position that is not padding changes the prediction
    assert not torch.allclose(guided_noise_prediction(pipe.unet, latents, timestep, embeds, None, 1.0), together)


def test_a_saved_model_draws_the_same(pipe, tmp_path):
    for part in (pipe.unet.conv_out, pipe.text_encoder.embeddings.LayerNorm):
        part.weight.data *= 1.1
    pipeline.save_model(pipe, tmp_path / "model")
    again = load_pipeline(tmp_path / "model")
    assert again.tokenizer.model_max_length == 24
    ours, theirs = (Sampler(one, "ddim", 3, 1.0, 2.0)(PROMPTS, [5, 5]) for one in (pipe, again))
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours[0], ours[1])


def test_a_wrong_unet_or_a_missing_record_is_refused(bert_pipeline_dir, tmp_path):
    broken = shutil.copytree(bert_pipeline_dir, tmp_path / "broken")
    weights = next((broken / "unet").glob("*.safetensors"))
    values = load_file(weights)
    values["conv_in.bias"] += 1
    save_file(values, weights, metadata={"format": "pt"})
    for named in (str(weights), pipeline.RECORD):
        refused(named, load_pipeline, broken)
        (broken / pipeline.RECORD).unlink(missing_ok=True)


def test_unet_weights_for_another_text_encoder_are_refused(pipe, bert_pipeline_dir, tmp_path):
    plain, with_bert = tmp_path / "unet.safetensors", tmp_path / "pretrained_unet.safetensors"
    save_file(pipe.unet.state_dict(), plain)
    save_file(pipe.unet.state_dict(), with_bert, metadata=pipeline.unet_metadata(pipe.unet))
    refused("for text encoder CLIP.* has BERT", load_pipeline, bert_pipeline_dir, unet_path=plain)
    tokenizer, encoder = scratch.build_clip(PROMPTS, 32, 1)
    scratch.assemble(pipe.vae, encoder, tokenizer, pipe.unet).save_pretrained(tmp_path / "clip")
    clip, message = load_pipeline(tmp_path / "clip", unet_path=plain), "for text encoder BERT .* has CLIP"
    refused(message, load_pipeline, tmp_path / "clip", unet_path=with_bert)
    refused(message, load_weights, clip.unet, with_bert)
    for weights in (plain, with_bert):  # without a record, as earlier versions of train.py wrote it
        load_weights(load_pipeline(bert_pipeline_dir, unet_path=with_bert).unet, weights)


def test_a_checkpoint_of_all_weights_names_the_text_encoder_of_its_model_in_any_dtype(bert_pipeline_dir, tmp_path):
    half = load_pipeline(bert_pipeline_dir, dtype=torch.bfloat16)
    pipeline.save_model(half, tmp_path / "half")
    half.text_encoder = None  # as in training
    unet = half.unet.float()
    saved = save_checkpoint(tmp_path, snapshot(unet, torch.optim.AdamW(unet.parameters()), None), {"epoch": 1}, 1)
    for model in (bert_pipeline_dir, tmp_path / "half"):
        again = load_pipeline(model, unet_path=saved / UNET_FILE)
        assert load_weights(again.unet, saved) == saved / UNET_FILE


def test_bert_takes_the_place_of_clip(tiny_pipeline_dir, bert_pipeline_dir, tmp_path):
    swapped = pipeline.with_bert(load_pipeline(tiny_pipeline_dir), bert_pipeline_dir, 12)
    assert swapped.tokenizer.model_max_length == 12 and encode_prompts(swapped, PROMPTS).shape == (2, 12, 32)
    for part in scratch.build_bert(PROMPTS, 48, 1, 24):
        part.save_pretrained(tmp_path)
    for other, message in ((tiny_pipeline_dir, "no BERT"), (tmp_path, "a BERT of width 48; give one of width 32")):
        refused(message, pipeline.with_bert, load_pipeline(tiny_pipeline_dir), other, 12)
