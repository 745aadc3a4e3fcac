"""Parts of a Stable Diffusion folder: loaded from every published form, or refused by file and tensor."""

import json
import shutil

import pytest
import torch
from judge_tools import FUNDUS_PROMPTS
from safetensors.torch import load_file, save_file

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator.from_scratch import build_bert, load_vae
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, encode_prompts, load_pipeline
from ddpo_pytorch.generator.text import check_tokens, load_text_encoder
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["judge_tools"]
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def copy(tiny_pipeline_dir, tmp_path):
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "model")


@pytest.fixture
def bert(tmp_path):
    """A folder of transformers with a BERT and its tokenizer."""
    torch.manual_seed(1)
    for part in build_bert(FUNDUS_PROMPTS, 32, 2, 24):
        part.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def refused(read, folder, *words):
    """Assert that reading the folder ends with one line that names it and the words."""
    with pytest.raises(UserError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    for word in (folder, *words):
        assert str(word) in str(caught.value)


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


@pytest.mark.parametrize("form", ["safetensors", "bin", "fp16.safetensors"])
@pytest.mark.parametrize("part", STEMS)
def test_a_missing_tensor_is_named(copy, part, form):
    name = sorted(load_file(copy / part / f"{STEMS[part]}.safetensors"))[5]
    refused(load_pipeline, copy, rewrite(copy, part, without(name), form), name)


@pytest.mark.parametrize("part", STEMS)
def test_a_tensor_of_another_shape_is_named_with_both(copy, part):
    name, value = sorted(load_file(copy / part / f"{STEMS[part]}.safetensors").items())[5]
    file = rewrite(copy, part, lambda weights: weights | {name: torch.zeros(7, 3)})
    refused(load_pipeline, copy, file, name, (7, 3), tuple(value.shape))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "down_blocks.0.resnets.9.conv1.weight"),
        ("vae", "decoder.up_blocks.7.resnets.0.conv1.weight"),
        ("text_encoder", "encoder.layers.9.mlp.fc1.weight"),
    ],
)
def test_a_tensor_that_the_configuration_has_no_place_for_is_named(copy, part, name):
    """Of a network with more layers than its config.json, half would be used."""
    refused(load_pipeline, copy, rewrite(copy, part, lambda weights: weights | {name: torch.zeros(2)}), name)


def draw(folder):
    pipe = load_pipeline(folder)
    latents = torch.ones(1, 4, 16, 16)
    embeds = encode_prompts(pipe, CAPTIONS[:1])
    with torch.no_grad():
        return embeds, pipe.unet(latents, 7, embeds).sample, pipe.vae.decode(latents).sample


def assert_drawn(folder, expected):
    for one, other in zip(draw(folder), expected, strict=True):
        assert torch.equal(one, other)


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


@pytest.mark.parametrize(
    ("part", "change", "form"),
    [
        *((part, dict, "bin") for part in STEMS),
        *(("vae", old_names, form) for form in ("safetensors", "bin")),
        *(("text_encoder", whole_clip, form) for form in ("safetensors", "bin")),
    ],
)
def test_published_forms_are_read_whole(copy, part, change, form):
    expected = draw(copy)
    rewrite(copy, part, change, form)
    assert_drawn(copy, expected)


@pytest.mark.parametrize("form", ["fp16.safetensors", "fp16.bin"])
def test_a_folder_of_the_variant_fp16_is_read(copy, form):
    for part in STEMS:
        rewrite(copy, part, lambda weights: {key: value.half().float() for key, value in weights.items()})
    expected = draw(copy)
    for part in STEMS:
        rewrite(copy, part, lambda weights: {key: value.half() for key, value in weights.items()}, form)
    assert_drawn(copy, expected)


def test_a_part_in_shards_is_read_and_a_missing_shard_is_not(copy):
    expected, pipe = draw(copy), load_pipeline(copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.unet.save_pretrained(copy / "unet", max_shard_size="100KB")
    shards = sorted((copy / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert_drawn(copy, expected)
    shards[0].unlink()
    refused(load_pipeline, copy, copy / "unet")


@pytest.mark.parametrize("part", [*STEMS, "scheduler", "tokenizer"])
def test_a_missing_folder_is_named(copy, part):
    shutil.rmtree(copy / part)
    refused(load_pipeline, copy, part)


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"])
@pytest.mark.parametrize("content", ["", "<html>", "[]"])
def test_a_damaged_configuration_is_one_line(copy, file, content):
    (copy / file).write_text(content)
    refused(load_pipeline, copy)


def test_autoencoders_and_text_encoders_alone_are_held_to_the_same(copy, bert):
    name = sorted(load_file(copy / "vae" / f"{STEMS['vae']}.safetensors"))[5]
    refused(load_vae, copy / "vae", rewrite(copy, "vae", without(name)), name)
    file = bert / "model.safetensors"
    weights, lost = load_file(file), "encoder.layer.1.output.dense.weight"
    for change, tensor in (
        (without(lost), lost),
        (lambda w: w | {"encoder.layer.0.output.dense.bias": torch.zeros(3)}, "encoder.layer.0.output.dense.bias"),
        (lambda w: w | {"encoder.layer.7.output.dense.bias": torch.zeros(3)}, "encoder.layer.7.output.dense.bias"),
    ):
        for prefix in ("", "bert."):  # as of a BERT with a head
            changed = {f"{prefix}{key}": value for key, value in change(weights).items()}
            save_file(changed, file, metadata={"format": "pt"})
            refused(load_text_encoder, bert, file, tensor)
    # heads of its pre-training, as published files have them, are left out
    heads = {"cls.predictions.bias": torch.zeros(5), "bert.pooler.dense.weight": torch.zeros(32, 32)}
    save_file({f"bert.{key}": value for key, value in weights.items()} | heads, file, metadata={"format": "pt"})
    _, encoder = load_text_encoder(bert)
    assert all(torch.equal(value, weights[key]) for key, value in encoder.state_dict().items())


def clip_files(folder):
    """Write the tokenizer of a model folder as SD 1.5 publishes it: vocab.json and merges.txt."""
    path = folder / "tokenizer" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    path.unlink()
    (path.parent / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (path.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def edited(change):
    """Return a function (folder) that applies a change to tokenizer.json's model."""

    def edit(folder):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content["model"])
        path.write_text(json.dumps(content))

    return edit


def removed(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


SPECIAL = {name: number for number, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
DAMAGE = {
    "no vocabulary": (removed("tokenizer.json"), "tokenizer.json"),
    "no settings": (removed("tokenizer_config.json"), "tokenizer_config.json"),
    "page": (written("tokenizer.json", "<html>"), ""),
    "empty object": (written("tokenizer.json", "{}"), ""),
    "settings of another type": (written("tokenizer_config.json", "[]"), ""),
    "no merges": (edited(lambda model: model.update(merges=[])), "merges"),
    "too many tokens": (edited(lambda model: model["vocab"].update(zz=max(model["vocab"].values()) + 1)), "embeddings"),
    "empty vocabulary": (edited(lambda model: model.update(vocab=SPECIAL)), ""),
}


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "empty vocabulary"])
def test_a_damaged_tokenizer_is_refused(copy, damage):
    change, word = DAMAGE[damage]
    change(copy / "tokenizer")
    for read in (load_pipeline, load_text_encoder):
        refused(read, copy, word)


@pytest.mark.parametrize("damage", ["no vocabulary", "empty vocabulary", "too many tokens"])
def test_a_damaged_tokenizer_of_bert_is_refused(bert, bert_pipeline_dir, tmp_path, damage):
    model = shutil.copytree(bert_pipeline_dir, tmp_path / "sd")
    DAMAGE[damage][0](bert)
    DAMAGE[damage][0](model / "tokenizer")
    for folder, read in ((bert, load_text_encoder), (model, load_text_encoder), (model, load_pipeline)):
        refused(read, folder)


@pytest.mark.parametrize("lost", ["nothing", "merges.txt", "vocab.json", "half of the merges"])
def test_a_tokenizer_in_two_files_needs_both(copy, lost):
    expected = PromptEmbeddings(load_pipeline(copy))(CAPTIONS)
    clip_files(copy)
    merges = copy / "tokenizer" / "merges.txt"
    if lost == "nothing":
        assert torch.equal(PromptEmbeddings(load_pipeline(copy))(CAPTIONS), expected)
        return
    if lost == "half of the merges":
        lines = merges.read_text().splitlines()
        merges.write_text("\n".join(lines[: len(lines) // 2]))
    else:
        (copy / "tokenizer" / lost).unlink()
    refused(load_pipeline, copy, "merges" if "merges" in lost else lost)


def test_vocabularies_of_words_are_read(bert):
    """BioMedBERT publishes vocab.txt."""
    tokenizer, _ = load_text_encoder(bert)
    numbers = tokenizer.get_vocab()
    (bert / "tokenizer.json").unlink()
    (bert / "vocab.txt").write_text("\n".join(sorted(numbers, key=numbers.get)) + "\n")
    again, _ = load_text_encoder(bert)
    assert again(list(FUNDUS_PROMPTS)).input_ids == tokenizer(list(FUNDUS_PROMPTS)).input_ids


def test_prompts_that_become_the_same_tokens_are_refused(tiny_pipeline_dir):
    """The words of another script, of which a small tokenizer knows no letter."""
    pipe = load_pipeline(tiny_pipeline_dir)
    with pytest.raises(UserError, match="2 captions .*'ネコ'"):
        check_tokens(pipe.tokenizer, ["ネコ", "イヌ"], "captions")
    for prompts in (["ネコ"], ["ネコ", "ネコ "], ["A nevus", "a nevus"], CAPTIONS, []):
        check_tokens(pipe.tokenizer, prompts)
    with pytest.raises(UserError, match="'ネコ'"):
        PromptEmbeddings(pipe).precompute(["ネコ", "イヌ"])
