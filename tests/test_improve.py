"""Best of N, metrics of rounds and collapse; generate.py and improve.py as users run them."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_tools import FUNDUS_PROMPTS, threshold_between, write_judges
from ml_collections import ConfigDict
from PIL import Image
from refusals import refused
from script_tools import files_of, load_module, options, read_config, read_lines, succeed

from ddpo_pytorch.data.fundus import load_split
from ddpo_pytorch.data.images import SYNTHETIC, save_image
from ddpo_pytorch.data.metadata import read_metadata
from ddpo_pytorch.data.ratings import read_ratings
from ddpo_pytorch.data.sample_folder import folder_name, read_log, write_log
from ddpo_pytorch.generator import pipeline
from ddpo_pytorch.judges.classifier import new_classifier
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, load_judges, save_policy
from ddpo_pytorch.judges.selector import save_selector
from ddpo_pytorch.metrics.fidelity import kernel_distance
from ddpo_pytorch.metrics.ssim import ms_ssim
from ddpo_pytorch.phantoms import fundus, rating_sets, skin
from ddpo_pytorch.phantoms.damage import degrade, vessel_contrast
from ddpo_pytorch.prompts import all_prompts
from ddpo_pytorch.rewards import build_reward
from ddpo_pytorch.rlhf import rounds
from ddpo_pytorch.rlhf.rounds import RoundMetrics, assess, collapse, features_of
from ddpo_pytorch.sampling import Sampler
from ddpo_pytorch.utils import distributed
from ddpo_pytorch.utils.fingerprint import fingerprint

TABLES = ("improve__csv", "improve__held_out_csv", "prompt_fn_kwargs__path")


@pytest.fixture(scope="module")
def sampler(bert_pipeline_dir):
    return Sampler(pipeline.load_pipeline(bert_pipeline_dir), "ddim", 2, 1.0, 1.0)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A fundus table of 24 images of 12 patients, with the captions that the tiny BERT knows, and ratings of them."""
    folder = tmp_path_factory.mktemp("table")
    lines, ratings = ["path,Text,modality,patient"], ["image_path,prompt,patient,rating"]
    for number in range(24):
        pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(number))
        save_image(folder / f"images/{number}.png", pixels)
        start = f'images/{number}.png,"{FUNDUS_PROMPTS[number % 2].removeprefix("Fundus: ")}"'
        lines.append(f"{start},Fundus,p{number // 2}")
        ratings.append(f"{start},p{number // 2},{1 + number % 3}")
    (folder / "ratings.csv").write_text("\n".join(ratings) + "\n")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_candidates_are_the_first_that_pass(sampler, judges_dir):
    """As by drawing all attempts of a request one by one and looking at them."""
    generate, (selector, policy) = load_module("scripts/generate.py"), load_judges(judges_dir)

    def serve(threshold, candidates=2):
        selector.threshold = threshold
        requests = [generate.Request(prompt, number) for prompt in FUNDUS_PROMPTS for number in range(2)]
        improve = {"num_candidates": candidates, "max_attempts": 5}
        config = ConfigDict({"improve": improve, "eval": {"batch_size": 3}, "seed": 7})
        served = generate.best_of_n(sampler, selector, policy, requests, config)
        return sorted(served, key=lambda one: (one.prompt, one.repetition))

    everything = serve(0.0, candidates=5)
    scores = [entry["selector"] for request in everything for entry, _ in request.kept]
    threshold = threshold_between(scores)
    assert len({round(score, 4) for score in scores}) > 10  # the judges tell images apart
    for request in serve(1.1):
        ((entry, _),) = request.kept
        assert request.attempts == 5 and (entry["passed"], entry["best"], entry["reward"]) == (False, True, "0.0000")
    for request, every in zip(serve(threshold), everything, strict=True):
        seeds = [entry["seed"] for entry, _ in every.kept]
        passing = [entry["seed"] for entry, _ in every.kept if entry["selector"] >= threshold][:2]
        entries = [entry for entry, _ in request.kept]
        if passing:
            assert [entry["seed"] for entry in entries] == passing and all(entry["passed"] for entry in entries)
            (best,) = (entry for entry in entries if entry["best"])
            assert best["policy"] == max(entry["policy"] for entry in entries)
            assert {entry["attempts"] for entry in entries} == {seeds.index(passing[1]) + 1 if passing[1:] else 5}
        else:  # only the last one is kept
            assert [entry["seed"] for entry in entries] == seeds[4:] and not entries[0]["passed"]
        for entry, image in request.kept:
            name = re.fullmatch(r"images/.+/Fundus_(\d+)_selector_(.{4})_policy_(.{4})\.png", entry["path_to_img"])
            pixels = image[None].float() / 255
            assert float(name[2]) == pytest.approx(selector.score(pixels).item(), abs=0.006)
            assert entry["artifacts"] == pytest.approx(selector.score_all(pixels)[0, 2].item(), abs=1e-3)
            assert float(name[3]) == pytest.approx(policy.score(pixels, [entry["prompt"]]).item(), abs=0.006)
            assert int(name[1]) == 5 * request.repetition + seeds.index(entry["seed"])


def test_the_reward_is_the_policys_score_of_what_passes(bert_pipeline_dir, tmp_path):
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [FUNDUS_PROMPTS[i % 2] for i in range(6)]
    selector, policy = load_judges(write_judges(tmp_path, bert_pipeline_dir, seed=3))
    quality, aligned = selector.score(images).double().numpy(), policy.score(images, prompts).double().numpy()
    selector.threshold = threshold_between(quality)
    save_selector(selector, tmp_path / SELECTOR_FILE)
    settings = {"fundus_alignment": {"judges": tmp_path}}
    rewards, info = build_reward("fundus_alignment", settings)(images, prompts, [])
    np.testing.assert_allclose(rewards, np.where(quality >= selector.threshold, aligned, 0), rtol=1e-5)
    np.testing.assert_allclose(info["selector"], quality, rtol=1e-5)
    assert 0 < (rewards > 0).sum() < 6
    selector.threshold = None
    save_selector(selector, tmp_path / SELECTOR_FILE)
    refused("no threshold", build_reward("fundus_alignment", settings), images, prompts, [])


def test_round_metrics_equal_those_computed_by_hand(judges_dir):
    selector, policy = load_judges(judges_dir)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (21, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images, prompts = drawn[:12], [FUNDUS_PROMPTS[0]] * 6 + [FUNDUS_PROMPTS[1]] * 6
    real, pixels = features_of(selector, drawn[12:], 4), images.float() / 255
    quality, aligned = selector.score(pixels), policy.score(pixels, prompts)
    selector.threshold = threshold_between(quality)
    metrics = assess(images, prompts, selector, policy, real, seed=1, batch_size=5)
    passed = (quality >= selector.threshold).float()
    assert metrics.alignment == pytest.approx((passed * aligned).mean().item(), abs=1e-6)
    assert (metrics.images, metrics.pass_rate) == (12, pytest.approx(passed.mean().item())) and 0 < passed.mean() < 1
    kid = kernel_distance(real, features_of(selector, images, 12), 1).value
    assert metrics.kid == pytest.approx(kid, abs=1e-9)
    similar = [ms_ssim(pixels[i, None], pixels[i + 1, None]).item() for i in range(11) if i != 5]
    assert metrics.ms_ssim == pytest.approx(np.mean(similar), abs=1e-6)
    given = images[:3], prompts[:3], selector, policy, real  # no error of KID to judge its rise by
    refused("3 drawn and 9 real images", assess, *given, seed=1, batch_size=5)


def test_guards_know_what_the_judges_may_not():
    """Mirrored halves and flat discs are far from real retinas in vessels, discs and another network's features."""
    rng = np.random.default_rng(0)
    draw = [fundus.draw("normal fundus", "left", fundus.draw_look(rng), rng, 64) for _ in range(24)]
    flat, mirrored = ([degrade(image, kind, 1.0, rng) for image in draw[12:]] for kind in ("flat", "mirrored"))
    parts = [torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2) for x in (draw[:12], draw[12:], flat, mirrored)]
    guards = rounds.Guards(parts[0], new_classifier(("guard",), 64, "test_efficientnet", "none").eval(), True, 1, 8)
    drawn, flat, mirrored = (RoundMetrics(0.5, 0.5, 0.5, 0.5, 0.1, 0.01, 0.2, 12, guards(x)) for x in parts[1:])
    vessels, contrasts = "vessels (sd from real)", np.reshape([vessel_contrast(image) for image in draw], (2, 12))
    expected = abs(contrasts[1].mean() - contrasts[0].mean()) / contrasts[0].std()
    assert drawn.guards[vessels][0] == pytest.approx(expected)
    assert drawn.guards["KID (test_efficientnet)"][0] < flat.guards["KID (test_efficientnet)"][0]
    assert f"{vessels} rose" in collapse([drawn, flat], 0.02, 3.0)
    assert "one disc (sd from real) rose" in collapse([drawn, mirrored], 0.02, 3.0)
    assert rounds.Guards(parts[0], None, False, 1, 8)(parts[1]) == {}


def test_fixed_noise_depends_on_nothing_but_seed_prompt_and_index(sampler):
    both = rounds.draw_fixed(sampler, FUNDUS_PROMPTS, 3, seed=5, batch_size=4)
    alone = rounds.draw_fixed(sampler, FUNDUS_PROMPTS[1:], 2, seed=5, batch_size=1)
    assert both.dtype == torch.uint8
    assert (both[3:5].int() - alone.int()).abs().max() <= 1 and not torch.equal(both[:2], alone)


def test_collapse_and_best():
    def metrics(alignment=0.5, kid=0.1, similar=0.2):
        return RoundMetrics(alignment, 0.5, 0.5, 0.5, kid, 0.01, similar, 100, {})

    for later, expected in (
        ([], ""),
        ([metrics(0.6, kid=0.12, similar=0.5)], ""),
        ([metrics(0.6), metrics(0.57)], "0.570"),
        ([metrics(0.6, kid=0.2)], "KID to real images rose from 0.1 to 0.2"),
        ([metrics(0.6, similar=0.61)], "MS-SSIM rose from 0.200 to 0.610"),
    ):
        said = collapse([metrics(), *later], tolerance=0.02, kid_tolerance=3.0)
        assert expected in said and bool(said) == bool(expected)
    # the hacked round has the highest score, and is not chosen
    assert rounds.best_round([metrics(), metrics(0.6), metrics(0.9, kid=0.2)], 0.02, 3.0) == 1


@pytest.fixture
def fields(table, bert_pipeline_dir, judges_dir, tmp_path):
    held_out = write_judges(tmp_path / "held-out-judges", bert_pipeline_dir, seed=4, threshold=0.1)
    parts = {"pretrained": {"model": bert_pipeline_dir}, "prompt_fn_kwargs": {"path": table / "table.csv"}}
    parts["sample"] = {"num_steps": 2, "guidance_scale": 1.0, "batch_size": 4, "num_batches_per_epoch": 1}
    parts |= {"eval": {"batch_size": 4, "prompts": ()}, "train": {"batch_size": 4, "cfg": False}}
    parts["improve"] = {"judges": judges_dir, "held_out_judges": held_out, "images_per_prompt": 2, "data_path": table}
    parts["improve"] |= {"csv": table / "table.csv", "held_out_csv": table / "table.csv", "held_out_images": 4}
    parts["improve"] |= {"num_steps": 2, "batch_size": 4, "rounds": 1, "tolerance": 1.0, "kid_tolerance": 1e9}
    parts["improve"] |= {"max_attempts": 4, "output": tmp_path / "improve"}
    parts["sd"] = {"image_size": 32, "text_encoder": "bert", "grid_every": 0}
    parts["sd"] |= {"output": tmp_path / "none", "cache_dir": tmp_path / "cache"}
    parts["rlhf"] = {"ratings": table / "ratings.csv", "image_size": 32, "resize": "stretch", "patch_size": 8}
    parts["rlhf"] |= {"width": 32, "heads": 2, "dropout": 0.0, "selector_layers": 1, "policy_layers": 1}
    parts["rlhf"] |= {"text_encoder": bert_pipeline_dir, "text_tokens": 24}
    parts["rlhf"] |= {"num_epochs": 1, "second_learning_rate": 1e-2}
    settings = {f"{part}__{name}": value for part, values in parts.items() for name, value in values.items()}
    settings |= {"prompt_fn": "fundus_table", "reward_fn": "fundus_alignment", "mixed_precision": "no"}
    return settings | {"log_with": "", "num_epochs": 1, "save_freq": 1}


@pytest.fixture
def run(run_main, config_file, fields):
    """Function (script, changes): run its main in this process with `fields` and these changes."""
    return lambda script, **changes: run_main(script, config_file, **fields | changes)


def script_and_settings(command):
    """Return the script of a command of improve.py and its settings by name."""
    position = next(number for number, word in enumerate(command) if Path(word).parent.name == "scripts")
    words = (word.removeprefix("--config.").split("=", 1) for word in command[position + 1 :])
    return Path(command[position]).name, dict(words)


@pytest.fixture
def commands(run, monkeypatch):
    """Commands of improve.py, which run in this process."""
    started = []

    def start(command, start=subprocess.run, **keywords):
        if not any(Path(word).parent.name == "scripts" for word in command):
            return start(command, **keywords)
        started.append(command)
        script, given = script_and_settings(command)
        literals = {name: ast.literal_eval(text) for name, text in given.items() if re.fullmatch(r"[\d.e(),-]+", text)}
        run(script, **{name.replace(".", "__"): value for name, value in (given | literals).items()})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(sys, "argv", ["improve.py"])
    return started


@pytest.mark.slow
def test_generate_with_two_processes_and_of_damaged_images_again(config_file, fields, run, tmp_path, caplog):
    settings = {"eval__batch_size": 1, "progress": False}
    run("generate.py", logdir=tmp_path / "one", **settings)
    succeed("generate.py", *options(config_file, **fields | settings, logdir=tmp_path / "two"), processes=2)
    one, two = (files_of(tmp_path / name / "images") for name in ("one", "two"))
    assert one == two and len(one) >= 4 and read_log(tmp_path / "one") == read_log(tmp_path / "two")
    (tmp_path / "one/images/unknown.png").touch()  # complete: nothing is drawn or removed
    run("generate.py", logdir=tmp_path / "one", **settings)
    assert (tmp_path / "one/images/unknown.png").exists()
    path = sorted((tmp_path / "one").glob("images/*/*.png"))[-1]
    assert Image.open(path).info["Comment"] == SYNTHETIC
    # the table of what passed is one of train_sd.py, of metric.py and of Hugging Face
    entries = read_log(tmp_path / "one")
    passed = [(entry["path_to_img"], entry["prompt"]) for entry in entries if entry["passed"]]
    rows, _, missing = load_split(tmp_path / "one" / "metadata.csv", tmp_path / "one")
    assert [(row.image, row.caption) for row in rows] == passed and not missing
    assert [(row.image, row.caption) for row in read_metadata(tmp_path / "one" / "metadata.csv")] == passed
    assert {entry["weights_sha256"] for entry in entries} == {rows[0].fields["weights_sha256"]}
    assert [float(row.fields["disc"]) for row in rows] == [entry["disc"] for entry in entries if entry["passed"]]
    log, table = tmp_path / "one" / "image_log.json", tmp_path / "one" / "metadata.csv"
    damages = [(lambda: path.write_bytes(path.read_bytes()[:-50]), path), (path.unlink, path), (table.unlink, table)]
    damages += [(lambda: write_log(log.parent, [e | {"best": 1} for e in entries]), log)]
    for damage, named in *damages, (lambda: log.write_text("[]"), log):
        damage()
        run("generate.py", logdir=tmp_path / "one", **settings)
        assert files_of(tmp_path / "one/images") == one and named.name in caplog.text and table.is_file()
        assert read_log(tmp_path / "one") == entries
        caplog.clear()


def test_a_single_wish(run, tmp_path, capsys):
    """--prompt gets the prefix of training and a folder of its own; the paths of the best images are printed."""
    run("generate.py", logdir=tmp_path / "out", prompt=[FUNDUS_PROMPTS[0].removeprefix("Fundus: ")], n=2)
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 2 and all(Path(path).is_file() for path in found)
    assert {Path(path).parent.name for path in found} == {folder_name(FUNDUS_PROMPTS[0])}


@pytest.mark.slow
def test_another_modality_has_ratings_judges_and_images_of_its_own(run, fields, tmp_path):
    """Skin phantoms as path,Text,modality with the field step off: no retina is looked for."""
    rng, lines = np.random.default_rng(0), ["path,Text,modality"]
    for number in range(12):
        picture = skin.draw([0, 0, number // 2 % 2, 0, number % 2, 1 - number % 2], rng, 32)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,A {('nevus', 'melanoma')[number % 2]}.,Dermoscopy")
    (table := tmp_path / "table.csv").write_text("\n".join(lines))
    rated = tmp_path / "rated"
    rating_sets.main([f"--csv={table}", f"--data_path={tmp_path}", f"--out={rated}", "--resize=pad", "--size=32"])
    fields |= {"rlhf__ratings": rated / "ratings.csv", "rlhf__resize": "pad"}
    run("train_rlhf.py", rlhf__output=tmp_path / "judges", rlhf__threshold=0.0)
    assert not (tmp_path / "judges/probes.md").exists()
    run("generate.py", improve__judges=tmp_path / "judges", prompt_fn_kwargs__path=table, logdir=tmp_path / "out")
    entries, ratings = read_log(tmp_path / "out"), read_ratings(rated / "ratings.csv")
    assert all(Path(entry["path_to_img"]).name.startswith("Dermoscopy_") for entry in entries) and len(ratings) == 36
    for prompts in ({entry["prompt"] for entry in entries}, {one.prompt for one in ratings}):
        assert prompts == {"Dermoscopy: A nevus.", "Dermoscopy: A melanoma."}


@pytest.mark.slow
def test_rounds_resume(run, fields, commands, tmp_path, monkeypatch, capsys, caplog):
    emptied, revisions, load = [], set(), pipeline._from_pretrained
    settings = {"improve__methods": ("finetune", "ddpo"), "improve__update_policy": True}
    settings["launch"] = "env accelerate launch"  # a program that is always there
    fields |= {"sd__train_text_encoder": True, "improve__learning_rate": 1e-2, "pretrained__revision": "v1"}
    monkeypatch.setattr(pipeline, "_from_pretrained", lambda *given: revisions.add(given[:2]) or load(*given))
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(sys, "argv", ["improve.py", "--launch", "env accelerate", "--config.seed=42", "-launch=x"])
    run("improve.py", **settings)
    output = tmp_path / "improve"
    entries = read_lines(output / "rounds.jsonl")
    assert [entry["round"] for entry in entries] == [0, 1] and entries[0]["alignment"] != entries[1]["alignment"]
    assert (output / "rounds.md").read_text() in capsys.readouterr().out
    assert (output / "best" / "model_index.json").is_file()
    # the Policy learned from fresh images, and chose in this round; the Selector, and those that measure, are the same
    assert all(command[:3] == ["env", "accelerate", "launch"] for command in commands)
    assert {command[4] for command in commands} == {"--config.seed=42"}
    assert "launch" not in " ".join(word for command in commands for word in command[4:])
    assert len(emptied) == len(commands)  # the script may need the memory of the last measurement
    scripts, given = zip(*map(script_and_settings, commands), strict=True)
    assert scripts == ("generate.py", "train_rlhf.py", "generate.py", "train_sd.py", "train.py")
    before, after = (files_of(folder) for folder in (fields["improve__judges"], output / "round_1/judges"))
    assert before[SELECTOR_FILE] == after[SELECTOR_FILE] and before[POLICY_FILE] != after[POLICY_FILE]
    updated = str(output / "round_1/judges")
    assert {one.get("improve.judges") for one in given} == {str(fields["improve__judges"]), updated, None}
    assert given[4]["reward_fn_kwargs.fundus_alignment.judges"] == updated
    rated, fresh = int(re.search(r"learning from (\d+) rated", caplog.text)[1]), read_log(output / "round_1/fresh")
    assert re.search(rf"stage 2: \d+ of {rated + len(fresh)} images", caplog.text)
    assert {revision for model, revision in revisions if model == str(fields["pretrained__model"])} == {"v1"}
    # the UNet was fine-tuned together with the text encoder
    models = fields["pretrained__model"], output / "round_1/finetune", output / "round_1/model"
    first, tuned, last = (fingerprint(pipeline.load_pipeline(model).text_encoder) for model in models)
    assert first != tuned == last
    # the control: the same noise and judges, no training, another guidance; measured once
    control = json.loads((output / "round_0/guidance_3.json").read_text())
    assert control.keys() == entries[0].keys() - {"round"} and control["policy"] != entries[0]["policy"]
    titles = [line.split("|")[1].strip() for line in (output / "rounds.md").read_text().splitlines()[2:]]
    assert titles == ["0", "base, guidance 3", "1"]
    (output / "round_0/guidance_3.json").write_text(json.dumps(control | {"alignment": 0.987}))
    # killed before the models of round 1 were saved, after the scripts had finished
    (output / "rounds.jsonl").write_text(json.dumps(entries[0]) + "\n")
    for name in ("model", "model_0"):
        shutil.rmtree(output / "round_1" / name)
    pool = (output / "round_1" / "pool" / "image_log.json").stat().st_mtime_ns
    run("improve.py", **settings)
    assert caplog.text.count("done before") == 1 and "guidance 3 without training scores 0.987" in caplog.text
    assert (output / "round_1/pool/image_log.json").stat().st_mtime_ns == pool
    assert read_lines(output / "rounds.jsonl") == entries
    with open(output / "rounds.jsonl", "a") as log:  # a round of a command that asked for more of them
        log.write(json.dumps(entries[1] | {"round": 2}) + "\n")
    run("improve.py", **settings)
    assert [entry["round"] for entry in read_lines(output / "rounds.jsonl")] == [0, 1, 2]


@pytest.mark.slow
def test_a_stopped_train_py_stops_its_round(run, fields, commands, tmp_path, monkeypatch):
    """A signal to the process on the GPU, after which train.py exits with code 0."""

    def check(request, checked=distributed.StopRequest.check):
        epochs.append(request)
        request.name = "SIGTERM" if len(epochs) == 2 else ""
        checked(request)

    epochs, output = [], tmp_path / "improve"
    fields |= {"num_epochs": 3, "improve__methods": ("ddpo",), "improve__control_guidance": ()}
    monkeypatch.setattr(distributed.StopRequest, "check", check)
    refused("round 1: train.py.*rerun the same command", run, "improve.py")
    assert [entry["round"] for entry in read_lines(output / "rounds.jsonl")] == [0]
    run("improve.py")
    assert [entry["round"] for entry in read_lines(output / "rounds.jsonl")] == [0, 1]
    assert [script_and_settings(command)[0] for command in commands] == ["train.py"] * 2
    assert len(epochs) == 4 and (output / "round_1/ddpo/run/checkpoint_3").is_dir()


def test_settings_out_of_range(run, fields, tmp_path):
    copied = shutil.copytree(fields["improve__judges"], tmp_path / "copy")
    header, *lines = fields["improve__held_out_csv"].read_text().splitlines()
    rated = [f"{line},{1 if number < 21 else 3}" for number, line in enumerate(lines)]
    (tmp_path / "poor.csv").write_text("\n".join([f"{header},quality", *rated]))
    (tmp_path / "one.csv").write_text("\n".join([header, *lines[::2]]))
    poor = {"improve__held_out_csv": tmp_path / "poor.csv"}
    few = {"improve__held_out_csv": tmp_path / "one.csv", "improve__held_out_images": 2}
    wrong = [("sd__image_size", 0), ("sd__resize", "x"), ("sd__lr_schedule", "none"), ("improve__rounds", 0)]
    wrong += [("mixed_precision", "fp8"), ("mixed_precision", "fp16"), ("sample__scheduler", "euler")]
    wrong += [("sample__num_steps", 2000)]
    for changes, message in (
        ({"improve__methods": ("sft",)}, "improve.methods.*'sft'"),
        ({"improve__methods": ("ddpo", "ddpo")}, "improve.methods.*each method once"),
        ({"sd__image_size": 64}, "sd.image_size is 64, .*32 x 32"),
        ({"improve__control_guidance": (3.0, "x")}, "improve.control_guidance.*'x'"),
        ({"improve__update_policy": True, "rlhf__ratings": ""}, "rlhf.ratings"),
        ({"improve__update_policy": True, "rlhf__stages": (3,)}, "rlhf.stages"),
        ({"improve__update_policy": True, "rlhf__width": 64}, "rlhf.width=32.* 64"),
        ({"improve__csv": ""}, "improve.csv"),
        ({"unet_path": "unet.safetensors"}, "unet_path.*pretrained.model"),
        ({"launch": "accelerate 'launch"}, "--launch=.*No closing quotation"),
        # before any file of a round is read
        ({"launch": "/nowhere/x launch", "improve__csv": tmp_path / "typo.csv"}, "--launch=.*'/nowhere/x'"),
        ({"improve__held_out_judges": copied}, "held_out_judges"),
        ({"improve__judges": fields["improve__held_out_judges"]}, "held_out_judges"),
        # of the scripts of a round
        *(({field: value}, f"{field.replace('__', '.')}.* {value!r}") for field, value in wrong),
        ({"improve__num_candidates": 9}, r"improve.num_candidates.*9.*\[1, 4\]"),
        *(({name: tmp_path / "typo.csv"}, "typo.csv.*does not exist") for name in TABLES),
        ({"improve__methods": ("ddpo",), "prompt_fn_kwargs__path": tmp_path / "typo.csv"}, "typo.csv.*does not exist"),
        ({"improve__methods": ("ddpo",), "sample__eta": 0.0}, "sample.eta.*0.0"),
        ({"improve__methods": ("ddpo",), "train__lora_targets": ("to_x",)}, "'to_x'"),
        ({"improve__update_policy": True, "rlhf__ratings": tmp_path / "typo.csv"}, "typo.csv.*does not exist"),
        # held-out images that do not suffice for KID
        (poor, "improve.held_out_csv.*21 images of quality 1, 3 images of quality 3"),
        (few, "improve.held_out_csv.*1 captions and 12 images"),
    ):
        refused(message, run, "improve.py", **changes)
    assert not (tmp_path / "improve").exists()
    refused(r"improve.num_candidates is 9.*\[1, 4\]", run, "generate.py", improve__num_candidates=9)


def test_best_links_to_a_folder_or_is_absent(tmp_path, caplog):
    """Output on another disk, behind a link; and a Hugging Face id."""
    link_best = load_module("scripts/improve.py").link_best
    for name in ("disk/runs/improve", "home/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home/out").symlink_to(tmp_path / "disk/runs")
    output = tmp_path / "home/out/improve"
    link_best(output, tmp_path / "home/model")
    assert (output / "best").samefile(tmp_path / "home/model") and not caplog.text
    link_best(output, Path("organisation/model"))
    assert not (output / "best").is_symlink() and "organisation/model" in caplog.text


def test_judges_of_common_patients_are_not_independent(judges_dir, tmp_path):
    selector, policy = load_judges(judges_dir)
    # in four, stage 2 of the Policy had more ratings
    sets = {"one": ("ab", "ab"), "two": ("b", "b"), "three": ("c", "c"), "four": ("c", "bc")}
    for name, (first, second) in sets.items():
        selector.origin, policy.origin = policy.origin | {"patients": [*first]}, policy.origin | {"patients": [*second]}
        save_selector(selector, tmp_path / name / SELECTOR_FILE)
        save_policy(policy, tmp_path / name / POLICY_FILE)
    rounds.check_independent(tmp_path / "one", tmp_path / "three")
    for name in ("two", "four"):
        refused("share 1 patients", rounds.check_independent, tmp_path / "one", tmp_path / name)


@pytest.fixture
def settings_of_rounds(fields, config_file):
    """Function (changes): what identifies the rounds of `fields` with these changes."""

    def settings(**changes):
        config = read_config(config_file, fields | changes)
        return json.loads(json.dumps(rounds.round_settings(config, torch.device("cpu"))))

    return settings


def test_rounds_and_pools_belong_to_contents(run, settings_of_rounds, fields, judges_dir, bert_pipeline_dir, tmp_path):
    """At the same paths: another schedule, judge, table."""
    model, judges = (shutil.copytree(place, tmp_path / place.name) for place in (bert_pipeline_dir, judges_dir))
    table = Path(shutil.copy(fields["improve__csv"], tmp_path / "table.csv"))
    fields |= {"pretrained__model": model, "improve__judges": judges, "improve__csv": table}
    fields["improve__images_per_prompt"] = 1
    before = settings_of_rounds()
    assert {prompt for prompt, _ in all_prompts("fundus_table", path=str(table))} == set(FUNDUS_PROMPTS)
    run("generate.py", logdir=tmp_path / "pool")
    schedule = model / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"beta_end": 0.02}))
    refused("model.scheduler", run, "generate.py", logdir=tmp_path / "pool")
    write_judges(judges, model, seed=5, threshold=0.1)
    table.write_text(table.read_text() + "\n")
    now = settings_of_rounds()
    assert {name for name in now if now[name] != before[name]} == {"model.scheduler", "contents.judges", "contents.csv"}


def test_rounds_belong_to_the_settings_that_their_methods_read(settings_of_rounds, fields, tmp_path):
    """Not to those of other methods, nor to the path of a file."""
    table = shutil.copy(fields["prompt_fn_kwargs__path"], tmp_path / "copy.csv")
    ddpo = {"num_epochs": 3, "train__learning_rate": 0.5, "train__kl_coef": 1.0, "early_stop__patience": 9}
    policy, finetune = {"rlhf__replay_share": 0.5}, {"sd__caption_dropout": 0.5, "sd__min_snr_gamma": 5.0}
    both = {"sd__resize": "crop"}
    changes = ddpo | policy | finetune | both | {"prompt_fn_kwargs__path": table}
    for methods, updated, expected in (("ddpo", True, ddpo | policy | both), ("finetune", False, finetune | both)):
        used = {"improve__methods": (methods,), "improve__update_policy": updated}
        before, now = settings_of_rounds(**used), settings_of_rounds(**used, **changes)
        differ = {name for name in before | now if now.get(name) != before.get(name)}
        assert differ == {name.replace("__", ".") for name in expected}
    (tmp_path / "one.csv").write_text("\n".join(Path(table).read_text().splitlines()[:2]))
    now = settings_of_rounds(**used, prompt_fn_kwargs__path=tmp_path / "one.csv")
    assert {name for name in now if now[name] != before[name]} == {"pool prompts"}
