"""Stage (i) with BERT, and fine-tuning on a pool: what train_sd.py writes, and that others open it."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from script_tools import options, succeed
from stage_tools import entries

from ddpo_pytorch.data.images import save_image
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.sample_folder import folder_name, read_log, write_log
from ddpo_pytorch.generator.finetune_data import MixedLatents
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.text import has_mask
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ("script_tools", "stage_tools")


@pytest.fixture(scope="module")
def bert_model(base, model, config_file, tmp_path_factory):
    """A model with a BERT from nothing, beside the autoencoder of the other one."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vae").symlink_to(model[0] / "vae")
    fields = base | {"sd__output": folder, "sd__stage": "unet", "sd__text_encoder": "bert", "sd__text_tokens": 20}
    succeed("train_sd.py", *options(config_file, **fields, sd__caption_dropout=0.1))
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A pool as generate.py writes it: five images, of which one did not pass."""
    folder, log = tmp_path_factory.mktemp("pool"), []
    for number in range(5):
        prompt = CAPTIONS[number % 2]
        path = f"images/{folder_name(prompt)}/{number}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        save_image(folder / path, torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(number)))
        log.append({"prompt": prompt, "path_to_img": path, "policy": 0.2 * (number + 1), "passed": number != 3})
    write_log(folder, log)
    return folder


def weights_of(folder, part):
    return load_file(next((folder / part).glob("*.safetensors")))


@pytest.mark.slow
def test_a_model_with_bert_opens_like_any_other(bert_model, config_file, tmp_path):
    pipe = load_pipeline(bert_model)
    assert has_mask(pipe.text_encoder) and pipe.tokenizer.model_max_length == 20
    fields = {"logdir": tmp_path / "samples", "pretrained__model": bert_model, "eval__num_samples_per_prompt": 1}
    fields |= {"eval__classifier": "", "sample__num_steps": 2, "mixed_precision": "no"}
    succeed("eval.py", *options(config_file, **fields, unet_path=bert_model / "pretrained_unet.safetensors"))
    assert len(read_log(tmp_path / "samples")) == 4


@pytest.mark.slow
def test_bert_takes_clips_place_frozen_or_slowly_trained(model, bert_model, train, tmp_path):
    start = {"pretrained__model": str(model[0]), "sd__bert": str(bert_model), "sd__text_encoder": "bert"}
    start |= {"sd__text_tokens": 16, "sd__ema_decay": 0.0, "sd__caption_dropout": 0.0}
    before = weights_of(bert_model, "text_encoder")
    train(tmp_path / "frozen", **start)
    after = weights_of(tmp_path / "frozen", "text_encoder")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_pipeline(tmp_path / "frozen").tokenizer.model_max_length == 16
    moved = {}
    for rate in (1e-3, 1e-4):
        folder = tmp_path / f"trained-{rate}"
        train(folder, **start, sd__train_text_encoder=True, sd__num_steps=1, sd__warmup_steps=0, sd__learning_rate=rate)
        load_pipeline(folder)
        for part in ("unet", "text_encoder"):
            old = weights_of(model[0] if part == "unet" else bert_model, part)
            new = weights_of(folder, part)
            moved[part, rate] = max(float((old[name] - new[name]).abs().max()) for name in old)
    # Adam's first step is as long as its learning rate: a tenth of the UNet's for the text encoder
    for rate in (1e-3, 1e-4):
        assert math.isclose(moved["unet", rate], rate, rel_tol=0.05)
        assert math.isclose(moved["text_encoder", rate], rate / 10, rel_tol=0.05)


@pytest.mark.slow
def test_a_pool_is_mixed_with_real_images(model, pool, train, tmp_path):
    start = {"pretrained__model": str(model[0]), "sd__val_csv": "", "sd__num_steps": 2}
    train(tmp_path / "mixed", **start, sd__pool=str(pool))
    train(tmp_path / "plain", **start)
    pool_latents = LatentShards(tmp_path / "mixed" / "latents" / "pool")
    assert len(pool_latents) == 4  # the one that did not pass is left out
    assert pool_latents.captions == sorted(CAPTIONS[:2])
    mixed, plain = (load_file(tmp_path / name / "pretrained_unet.safetensors") for name in ("mixed", "plain"))
    assert any(not torch.equal(mixed[name], plain[name]) for name in mixed)
    assert [entry["step"] for entry in entries(tmp_path / "mixed" / "finetune.jsonl") if "loss" in entry] == [1, 2]

    real = LatentShards(tmp_path / "mixed" / "latents" / "train")
    both = MixedLatents(real, pool_latents, [0.2, 0.4, 0.6, 1.0], 0.75)
    assert len(both) == len(real) + round(len(real) / 3)
    names = both.captions
    both.renumber(names)
    weights = torch.stack([both[position][3] for position in range(len(both))])
    assert (weights[: len(real)] == 1).all()
    expected = torch.tensor([0.2, 0.4, 0.6, 1.0]) / 0.55
    drawn = weights[len(real) :]
    torch.testing.assert_close(drawn, expected.repeat(9)[: len(drawn)])
    assert names[both[len(real)][2]] == CAPTIONS[0] and names[both[len(real) + 1][2]] == CAPTIONS[1]
    for share, scores in ((0.4, [1, 1, 1, 1]), (0.5, [0, 0, 0, 0]), (0.5, [1, 1])):
        with pytest.raises(UserError):
            MixedLatents(real, pool_latents, scores, share)


@pytest.mark.slow
def test_a_pool_without_passing_images_is_told(model, pool, train, tmp_path):
    log = read_log(pool)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "image_log.json").write_text(json.dumps([entry | {"passed": False} for entry in log]))
    with pytest.raises(UserError, match="no image that the Selector passed"):
        train(tmp_path / "out", pretrained__model=str(model[0]), sd__pool=str(tmp_path / "none"))


def test_fundus_images_that_are_ambiguous_are_named(model, train, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGBA", (32, 32), (90, 0, 0, 128)).save(tmp_path / "images" / "glass.png")
    (tmp_path / "t.csv").write_text("path,Text,modality\nimages/glass.png,drusen,Fundus\n")
    fields = {"pretrained__model": str(model[0]), "sd__kind": "fundus", "sd__csv": str(tmp_path / "t.csv")}
    with pytest.raises(UserError, match="glass.png"):
        train(tmp_path / "out", **fields, sd__val_csv="", sd__data_path=str(tmp_path))
