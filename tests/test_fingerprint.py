"""The one fingerprint: what changes it, and work that is not continued; train.py --config.load_from."""

import json
import os
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from refusals import refused
from rl_tools import LIGHT, train_with, usual_settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_tools import files_of, read_lines, stopped_at_save

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.lora import add_lora, lora_state_dict
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, encode_prompts, load_pipeline
from ddpo_pytorch.sampling import draw_images
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints, with_contents

LORA = "pytorch_lora_weights.safetensors"


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def nudge(path):
    """Change one number of a weight file, whose size stays."""
    with safe_open(path, framework="pt") as file:
        weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    weights[min(weights)].view(-1)[0] += 0.25
    save_file(weights, path, metadata=metadata)


def swap_letters(path):
    """Let a tokenizer number two letters the other way round."""
    model = json.loads(path.read_text())["model"]
    numbers = model["vocab"]
    edit(path, model=model | {"vocab": numbers | {"a</w>": numbers["e"], "e": numbers["a</w>"]}})


# what a user may replace at the same path, and the part that it changes: file, change, part
CHANGES = {
    "unet": ("unet/diffusion_pytorch_model.safetensors", nudge, "model.unet"),
    "text encoder": ("text_encoder/model.safetensors", nudge, "model.text_encoder"),
    "vae": ("vae/diffusion_pytorch_model.safetensors", nudge, "model.vae"),
    "scaling factor": ("vae/config.json", partial(edit, scaling_factor=0.5), "model.vae"),
    "activation": ("unet/config.json", partial(edit, act_fn="gelu"), "model.unet"),
    "schedule": ("scheduler/scheduler_config.json", partial(edit, beta_end=0.02), "model.scheduler"),
    "tokenizer": ("tokenizer/tokenizer.json", swap_letters, "model.tokenizer"),
    "tokens": ("tokenizer/tokenizer_config.json", partial(edit, model_max_length=70), "model.tokenizer"),
    "reward": ("../H6.safetensors", nudge, "reward.isic_classifier_reward"),
    "prompts": ("../prompts.txt", lambda path: path.write_text("\n".join(CAPTIONS[4:8]) + "\n"), "prompts"),
}


@contextmanager
def replaced(folder, name):
    """Make one of the CHANGES in a model's folder or next to it, for this context; yield the part."""
    file, change, part = CHANGES[name]
    kept = (folder / file).read_bytes()
    change(folder / file)
    try:
        yield part
    finally:
        (folder / file).write_bytes(kept)


def test_each_file_of_a_model_counts_in_its_part_and_nothing_else(own_model, tmp_path):
    """Neither another place, saving again, as .bin, the description by another version, nor what it was used for."""
    before = pipeline_fingerprints(load_pipeline(own_model))
    for name in list(CHANGES)[:-2]:
        with replaced(own_model, name) as part:
            after = pipeline_fingerprints(load_pipeline(own_model))
        assert {name for name in before if before[name] != after[name]} == {part}
    pipe = load_pipeline(own_model)
    encode_prompts(pipe, CAPTIONS[:2])
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.save_pretrained(again := tmp_path / "again")
    weights = again / CHANGES["unet"][0]
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    edit(again / "vae" / "config.json", _diffusers_version="9.0", _name_or_path="x")
    edit(again / "text_encoder" / "config.json", transformers_version="9.0")
    assert pipeline_fingerprints(pipe) == before == pipeline_fingerprints(load_pipeline(again))


def test_files_folders_and_settings_that_name_them_count_by_content(tmp_path, monkeypatch):
    (folder := tmp_path / "judges").mkdir()
    (file := folder / "a.safetensors").write_bytes(b"1234")
    (folder / "log.jsonl").write_text("{}")
    before = fingerprint(folder), fingerprint(file)
    assert before == (fingerprint(shutil.copytree(folder, tmp_path / "other")), fingerprint(file))
    (folder / "log.jsonl").write_text("{}\n{}")
    (folder / "grid.png").write_bytes(b"1")
    assert fingerprint(folder) == before[0]
    times = os.stat(file)
    file.write_bytes(b"1235")  # as long, and dated back
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(folder) != before[0] and fingerprint(file) != before[1]
    path = tmp_path / "h6.pth"
    settings = {"classifier": str(path), "weight": 0.5, "names": ["a", str(path)], "none": None}
    found = {fingerprint(with_contents(settings))}
    for content in (b"first", b"second"):
        path.write_bytes(content)
        found.add(fingerprint(with_contents(settings)))
    assert len(found) == 3
    (tmp_path / "word").mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_contents({"mode": "word", "path": "./word"}) == {"mode": "word", "path": Path("word")}
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})


# Work that is continued: the same command, after a file was replaced under its name.


def test_eval_does_not_complete_a_folder_of_another_model(own_model, config_file, run_main, tmp_path):
    fields = {"pretrained__model": str(own_model), "logdir": str(tmp_path / "samples"), "eval__classifier": ""}
    fields |= {"sample__num_steps": 1, "eval__num_samples_per_prompt": 1, "load_from": str(tmp_path / "a.safetensors")}
    add_lora(unet := load_pipeline(own_model).unet, 2, ("to_q",), seed=0)
    weights = {f"unet.{name}": value for name, value in unet.state_dict().items() if "lora" in name}
    save_file(weights, tmp_path / "a.safetensors")
    run_main("eval.py", config_file, **fields)
    before = files_of(tmp_path / "samples")
    for name in ("unet", "vae", "schedule", "tokenizer"):
        with replaced(own_model, name) as part:
            refused(part, run_main, "eval.py", config_file, **fields | {"eval__num_samples_per_prompt": 2})
    run_main("eval.py", config_file, **fields)
    nudge(tmp_path / "a.safetensors")
    refused("load_from", run_main, "eval.py", config_file, **fields)
    assert files_of(tmp_path / "samples") == before


def test_a_moved_model_is_the_same_and_another_is_not(rl, own_model, world, config_file, run_main, tmp_path):
    fields = {"logdir": str(tmp_path / "real"), "dataset__image_size": 32}
    fields |= {"dataset__csv": str(world / "splits" / "phantom_test.csv"), "dataset__data_path": str(world / "images")}
    run_main("extract_dataset_latents.py", config_file, pretrained__model=str(own_model), **fields)
    folder, index = rl.train(), tmp_path / "real" / "latents" / "index.json"
    moved = own_model.rename(own_model.with_name("moved"))
    judge = (tmp_path / "H6.safetensors").rename(tmp_path / "moved.safetensors")
    index.unlink()  # as after a kill
    run_main("extract_dataset_latents.py", config_file, pretrained__model=str(moved), **fields)
    assert index.is_file()
    reward = {"reward_fn_kwargs__isic_classifier_reward__classifier": str(judge)}
    rl.train(num_epochs=2, pretrained__model=str(moved), **reward)
    assert (folder / "checkpoint_2").is_dir()
    index.unlink()
    nudge(moved / CHANGES["vae"][0])
    refused("vae_sha256", run_main, "extract_dataset_latents.py", config_file, pretrained__model=str(moved), **fields)


def test_training_does_not_resume_with_other_files_or_code_at_the_same_paths(rl, own_model, tmp_path, monkeypatch):
    folder = rl.train()
    named = {"resume_from": str(folder)}
    for name, fields in (("unet", named), ("vae", {}), ("tokenizer", {}), ("reward", named), ("prompts", {})):
        with replaced(own_model, name) as part:
            refused(f"another {part} ", rl.train, num_epochs=2, **fields)
    assert not (folder / "checkpoint_2").exists()
    rl.train(num_epochs=2)
    assert (folder / "checkpoint_2").is_dir()
    monkeypatch.chdir(tmp_path)
    reward, prompt = tmp_path / "own_reward.py", tmp_path / "own_prompt.py"
    reward.write_text("def red():\n    return lambda images, prompts, metadata: (images[:, 0].mean((1, 2)), {})\n")
    prompt.write_text("def cat():\n    return 'a cat'\n")
    own = {"reward_fn": "own_reward:red", "prompt_fn": "own_prompt:cat", "prompt_fn_kwargs__path": None}
    own["run_name"] = "own"
    rl.train(**own)
    for path, part in ((reward, "code of reward_fn"), (prompt, "code of prompt_fn")):
        code = path.read_text()
        path.write_text(code.replace("return", "return  "))
        refused(f"another {part} ", rl.train, num_epochs=2, **own)
        path.write_text(code)


@pytest.mark.slow
def test_stage_one_does_not_resume_on_another_base(own_model, train_stage, tmp_path):
    fields = {"pretrained__model": str(own_model), "sd__image_size": 64, "sd__num_steps": 3, "sd__save_every": 1}
    fields |= {"sd__val_csv": "", "sd__limit": 8}
    with stopped_at_save(2, written=False):
        train_stage(tmp_path / "out", **fields)
    for change, what in (("unet", "initial weights"), ("tokenizer", "captions"), ("vae", "vae_sha256")):
        with replaced(own_model, change):
            refused(what, train_stage, tmp_path / "out", **fields)
    train_stage(tmp_path / "out", **fields)
    assert (tmp_path / "out" / "pretrained_unet.safetensors").is_file()


@pytest.fixture(scope="module")
def earlier(script, tiny_pipeline_dir, judges, tmp_path_factory):
    """The run folder of an epoch of training; to be left as it is."""
    settings = usual_settings(tiny_pipeline_dir, judges[6], tmp_path_factory.mktemp("earlier"))
    return train_with(script, settings | LIGHT, {"num_epochs": 1})[0]


def test_training_starts_from_an_adapter_as_eval_reads_it(rl, earlier, own_model, tmp_path):
    """A run folder, a checkpoint or a file; the same weights and images as eval.py's, and a ratio of 1."""
    weights = load_file(earlier / "checkpoint_1" / LORA)
    assert all(value.any() for value in weights.values())
    evaluated = load_pipeline(own_model)
    load_weights(evaluated.unet, earlier)
    torch.save(weights, tmp_path / "adapter.bin")
    for place in (earlier, earlier / "checkpoint_1", earlier / "checkpoint_1" / LORA, tmp_path / "adapter.bin"):
        run = rl.set_up(load_from=str(place))
        started = lora_state_dict(run.pipe.unet)
        assert started.keys() == weights.keys() and all(started[name].equal(weights[name]) for name in weights)
    drawn = []
    for pipe, table in ((evaluated, PromptEmbeddings(evaluated)), (run.pipe, run.embeddings)):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        drawn.append(draw_images(pipe, table, CAPTIONS[:2], generators, Sampling(2, 5, 1)))
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)
    folder = rl.train(load_from=str(earlier), train__kl_coef=0.1)
    (entry,) = read_lines(folder / "metrics.jsonl")
    # updates see other batches than the rollout, whose kernels may add up in another order
    assert entry["first_ratio_deviation"] < 1e-5 and entry["kl_to_base"] > 0
    now = load_file(folder / "checkpoint_1" / LORA)
    assert not all(now[name].equal(weights[name]) for name in weights)
    (fresh,) = read_lines(rl.train(run_name="fresh", train__kl_coef=0.1) / "metrics.jsonl")
    assert fresh["kl_to_base"] < entry["kl_to_base"]


def test_what_cannot_be_started_from_is_one_line_and_leaves_nothing(rl, earlier, own_model, tmp_path):
    weights = load_file(earlier / "checkpoint_1" / LORA)
    doubled = {key: torch.cat([value, value], dim=int("lora_B" in key)) for key, value in weights.items()}
    save_file(doubled, tmp_path / "8.safetensors")
    save_file({key: value for key, value in weights.items() if "to_k" not in key}, tmp_path / "few.safetensors")
    unet = str(own_model / "unet" / "diffusion_pytorch_model.safetensors")
    for fields, words in (
        ({"load_from": "/nowhere/adapter"}, ["/nowhere/adapter"]),
        ({"load_from": str(tmp_path / "8.safetensors")}, ["8.safetensors", "train.lora_rank"]),
        ({"load_from": str(tmp_path / "few.safetensors")}, ["few.safetensors", "to_k"]),
        ({"load_from": str(earlier), "train__lora_targets": ("to_q",)}, ["train.lora_targets"]),
        ({"load_from": unet}, [unet, "use_lora=True"]),
        ({"load_from": str(earlier), "use_lora": False}, [LORA, "use_lora=False"]),
    ):
        refused(words, rl.train, **fields)
        assert not (tmp_path / "logs" / "run").exists()


def test_a_resumed_run_keeps_its_own_checkpoint(rl, earlier, own_model, tmp_path):
    """And whether it started from these weights is compared, wherever they lie now."""
    whole = rl.train(load_from=str(earlier), run_name="whole", num_epochs=2)
    folder = rl.train(load_from=str(earlier))
    rl.train(load_from=str(shutil.copytree(earlier, tmp_path / "moved") / "checkpoint_1"), num_epochs=2)
    assert files_of(folder / "checkpoint_2") == files_of(whole / "checkpoint_2")
    other = rl.train(run_name="other", seed=3)
    before = files_of(folder)
    for start in ("", str(other)):
        refused("load_from", rl.train, num_epochs=3, load_from=start)
        assert files_of(folder) == before
    rl.train(num_epochs=3, resume_from=str(folder))
    assert (folder / "checkpoint_3").is_dir()
    # and that of a full UNet needs no weights to start from
    nudge(path := shutil.copy(own_model / CHANGES["unet"][0], tmp_path / "full.safetensors"))
    folder = rl.train(use_lora=False, load_from=str(path), run_name="full")
    before = files_of(folder)
    rl.train(use_lora=False, resume_from=str(folder), run_name="full")  # nothing is left to do
    assert files_of(folder) == before
