"""Parts of a Stable Diffusion folder: loaded from every published form, or refused by file and tensor."""

import json
import shutil

import pytest
import torch
from rated_world import PROMPTS, write_bert
from refusals import refused
from safetensors.torch import load_file, save_file

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator.from_scratch import load_vae
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, encode_prompts, load_pipeline
from ddpo_pytorch.generator.text import check_tokens, load_text_encoder

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def bert(tmp_path):
    """A folder of transformers with a BERT and its tokenizer."""
    return write_bert(tmp_path / "bert")


def rewrite(folder, part, change, form="safetensors"):
    """Apply a change to the tensors of a part, and write them in a form; returns the file."""
    old = folder / part / f"{STEMS[part]}.safetensors"
    weights = change(load_file(old))
    old.unlink()
    stem = "pytorch_model" if part == "text_encoder" and "bin" in form else STEMS[part]
    file = folder / part / f"{stem}.{form}"
    if form.endswith("bin"):
        torch.save(weights, file)
    else:
        save_file({name: value.contiguous() for name, value in weights.items()}, file, metadata={"format": "pt"})
    return file


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def with_tensor(name, *shape, value=0.0):
    return lambda weights: weights | {name: torch.full(shape or weights[name].shape, value)}


# part, form, change, and words of the error. Of a network with more layers than its config.json, half would be used.
UNFIT = [
    ("unet", "safetensors", without("conv_in.weight"), ["conv_in.weight"]),
    ("vae", "bin", without("decoder.conv_in.bias"), ["decoder.conv_in.bias"]),
    ("text_encoder", "fp16.safetensors", without("final_layer_norm.bias"), ["final_layer_norm.bias"]),
    ("unet", "safetensors", with_tensor("conv_in.weight", 7, 3), ["conv_in.weight", "(7, 3)", "(16, 4, 3, 3)"]),
    ("text_encoder", "bin", with_tensor("final_layer_norm.bias", 7), ["final_layer_norm.bias", "(7,)", "(32,)"]),
    ("text_encoder", "safetensors", with_tensor("encoder.layers.9.mlp.fc1.weight", 2), ["encoder.layers.9"]),
    ("unet", "safetensors", with_tensor("conv_in.bias", value=float("inf")), ["conv_in.bias"]),
    ("text_encoder", "bin", with_tensor("final_layer_norm.bias", value=float("nan")), ["final_layer_norm.bias"]),
]


@pytest.mark.parametrize(("part", "form", "change", "words"), UNFIT)
def test_tensors_that_are_missing_or_do_not_fit_are_named(own_model, part, form, change, words):
    file = rewrite(own_model, part, change, form)
    refused([str(file), *words], load_pipeline, own_model)
    if part == "vae":
        refused([str(file), *words], load_vae, own_model / "vae")
    if part == "text_encoder":
        refused([str(file), *words], load_text_encoder, own_model)


def test_weights_that_overflow_in_half_precision_are_named(own_model):
    rewrite(own_model, "unet", with_tensor("conv_in.bias", value=1e5))  # the largest half is 65504
    load_pipeline(own_model)
    refused([str(own_model), "conv_in.bias", "float16"], load_pipeline, own_model, dtype=torch.float16)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"
OTHER = [("vae/diffusion_pytorch_model.bin", POINTER, "git lfs"), ("unet/config.json", "", "")]
OTHER += [("vae/diffusion_pytorch_model.safetensors", "<!DOCTYPE html>", "web page")]
OTHER += [("scheduler/scheduler_config.json", "[]", ""), ("text_encoder/config.json", "<html>", "")]
OTHER += [(part, "", part) for part in ("vae", "text_encoder", "scheduler", "tokenizer")]


@pytest.mark.parametrize(("name", "content", "word"), OTHER)
def test_folders_that_are_missing_and_files_that_are_something_else_are_named(own_model, name, content, word):
    place = own_model / name
    if place.is_dir():
        shutil.rmtree(place)
    else:
        if "vae" in name:
            (place.parent / "diffusion_pytorch_model.safetensors").unlink()
        place.write_text(content)
    refused([str(own_model), word], load_pipeline, own_model)


def draw(folder):
    pipe = load_pipeline(folder)
    embeds = encode_prompts(pipe, CAPTIONS[:1])
    with torch.no_grad():
        latents = torch.ones(1, 4, 16, 16)
        return torch.cat([pipe.unet(latents, 7, embeds).sample.flatten(), pipe.vae.decode(latents).sample.flatten()])


def old_names(weights):
    """Attention of a VAE as diffusers named it before 0.18: SD 1.5's own VAE still has these names."""
    renamed = {}
    for key, value in weights.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[key] = value
    assert renamed.keys() != weights.keys()
    return renamed


def whole_clip(weights):
    """A CLIP of which the text model is one part, with the position numbers that older libraries saved."""
    named = {f"text_model.{key}": value for key, value in weights.items()}
    extra = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(())}
    return named | extra | {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2)}


def test_published_forms_the_variant_fp16_and_shards_are_read_and_a_missing_shard_is_not(own_model, tmp_path):
    expected, published = draw(own_model), shutil.copytree(own_model, tmp_path / "published")
    forms = {"unet": (dict, "bin"), "vae": (old_names, "safetensors"), "text_encoder": (whole_clip, "bin")}
    for part, (change, form) in forms.items():
        rewrite(published, part, change, form)
        assert torch.equal(draw(published), expected), part
    for part in STEMS:
        rewrite(own_model, part, lambda weights: {key: value.half().float() for key, value in weights.items()})
    expected, pipe = draw(own_model), load_pipeline(own_model)
    for part in ("vae", "text_encoder"):
        half = "fp16.bin" if part == "vae" else "fp16.safetensors"
        rewrite(own_model, part, lambda weights: {key: value.half() for key, value in weights.items()}, half)
    (own_model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.unet.save_pretrained(own_model / "unet", max_shard_size="100KB")
    shards = sorted((own_model / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and torch.equal(draw(own_model), expected)
    shards[0].unlink()
    refused([str(own_model / "unet")], load_pipeline, own_model)


def test_a_noise_schedule_without_its_numbers_is_refused(own_model):
    file = own_model / "scheduler" / "scheduler_config.json"
    stated = json.loads(file.read_text())
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"):
        file.write_text(json.dumps({key: value for key, value in stated.items() if key != name}))
        refused([str(file), name], load_pipeline, own_model)


def test_a_bert_is_read_without_its_heads_and_refused_without_a_tensor(bert):
    file, lost = bert / "model.safetensors", "encoder.layer.1.output.dense.weight"
    weights = load_file(file)
    for prefix in ("", "bert."):  # as of a BERT with a head
        changed = {f"{prefix}{key}": value for key, value in without(lost)(weights).items()}
        save_file(changed, file, metadata={"format": "pt"})
        refused([str(file), lost], load_text_encoder, bert)
    heads = {"cls.predictions.bias": torch.zeros(5), "bert.pooler.dense.weight": torch.zeros(32, 32)}
    save_file({f"bert.{key}": value for key, value in weights.items()} | heads, file, metadata={"format": "pt"})
    _, encoder = load_text_encoder(bert)
    assert all(torch.equal(value, weights[key]) for key, value in encoder.state_dict().items())


SPECIAL = {name: number for number, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
# of a tokenizer: a file, its new content, None or a change of its model, words of the error, and whether it is a BERT's
DAMAGE = {
    "no vocabulary": ("tokenizer.json", None, "tokenizer.json", False),
    "no settings": ("tokenizer_config.json", None, "tokenizer_config.json", False),
    "page": ("tokenizer.json", "<html>", "", False),
    "other settings": ("tokenizer_config.json", "[]", "", False),
    "no merges": ("tokenizer.json", lambda old: {"merges": []}, "merges", False),
    "half of the merges": ("tokenizer.json", lambda old: {"merges": old["merges"][::2]}, "merges", False),
    "too many": ("tokenizer.json", lambda old: {"vocab": old["vocab"] | {"zz": len(old["vocab"])}}, "embeddings", True),
    "empty": ("tokenizer.json", lambda old: {"vocab": SPECIAL}, "same tokens", True),
}


@pytest.mark.parametrize(("name", "change", "word", "of_bert"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_tokenizer_is_refused(own_model, bert, name, change, word, of_bert):
    folder = bert if of_bert else own_model
    file = folder / name if of_bert else folder / "tokenizer" / name
    if callable(change):
        content = json.loads(file.read_text())
        change = json.dumps(content | {"model": content["model"] | change(content["model"])})
    file.unlink() if change is None else file.write_text(change)
    for load in (load_text_encoder,) if of_bert else (load_text_encoder, load_pipeline):
        refused([str(folder), word], load, folder)


def test_vocabularies_in_other_files_are_read(own_model, bert):
    """SD 1.5 publishes vocab.json and merges.txt, which go together, BioMedBERT vocab.txt."""
    expected, path = PromptEmbeddings(load_pipeline(own_model))(CAPTIONS), own_model / "tokenizer" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    path.unlink()
    (path.parent / "vocab.json").write_text(json.dumps(model["vocab"]))
    refused([str(own_model), "merges.txt"], load_pipeline, own_model)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (path.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    assert torch.equal(PromptEmbeddings(load_pipeline(own_model))(CAPTIONS), expected)

    tokenizer, _ = load_text_encoder(bert)
    numbers = tokenizer.get_vocab()
    (bert / "tokenizer.json").unlink()
    (bert / "vocab.txt").write_text("\n".join(sorted(numbers, key=numbers.get)) + "\n")
    again, _ = load_text_encoder(bert)
    assert again(list(PROMPTS)).input_ids == tokenizer(list(PROMPTS)).input_ids


def test_prompts_that_become_the_same_tokens_are_refused(tiny_pipeline_dir):
    """The words of another script, of which a small tokenizer knows no letter."""
    pipe = load_pipeline(tiny_pipeline_dir)
    refused("2 captions .*'ネコ'", check_tokens, pipe.tokenizer, ["ネコ", "イヌ"], "captions")
    for prompts in (["ネコ"], ["ネコ", "ネコ "], ["A nevus", "a nevus"], CAPTIONS, []):
        check_tokens(pipe.tokenizer, prompts)
    refused("'ネコ'", PromptEmbeddings(pipe).precompute, ["ネコ", "イヌ"])
