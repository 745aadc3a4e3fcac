"""Best of N, metrics of rounds and collapse; generate.py and improve.py as users run them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_tools import FUNDUS_PROMPTS, threshold_between, write_judges
from script_tools import files_of, load_module, options, succeed

from ddpo_pytorch.data.images import save_image
from ddpo_pytorch.data.sample_folder import read_log
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.policy import SELECTOR_FILE, load_judges
from ddpo_pytorch.judges.selector import save_selector
from ddpo_pytorch.metrics.kernel import kernel_distance
from ddpo_pytorch.metrics.ssim import ms_ssim
from ddpo_pytorch.prompts import all_prompts
from ddpo_pytorch.rewards import build_reward
from ddpo_pytorch.rlhf.best_of_n import Request, best_of_n, log_entries
from ddpo_pytorch.rlhf.rounds import RoundMetrics, assess, collapse, draw_fixed, features_of, round_settings
from ddpo_pytorch.sampling import Sampler
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ("script_tools", "judge_tools")


@pytest.fixture(scope="module")
def sampler(bert_pipeline_dir):
    return Sampler(load_pipeline(bert_pipeline_dir), "ddim", 2, 1.0, 1.0)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A fundus table of 24 images of 12 patients, with the captions that the tiny BERT knows."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "images").mkdir()
    lines = ["path,Text,modality,patient"]
    for number in range(24):
        prompt = FUNDUS_PROMPTS[number % 2].removeprefix("Fundus: ")
        pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(number))
        save_image(folder / f"images/{number}.png", pixels)
        lines.append(f'images/{number}.png,"{prompt}",Fundus,p{number // 2}')
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


def serve(sampler, judges, threshold, requests, candidates=2, attempts=5, batch=3, seed=7):
    selector, policy = judges
    selector.threshold = threshold
    return list(best_of_n(sampler, selector, policy, requests, candidates, attempts, batch, seed))


def test_candidates_are_the_first_that_pass(sampler, judges_dir):
    """As by drawing all attempts of a request one by one and looking at them."""
    selector, policy = load_judges(judges_dir)
    requests = [Request(prompt, number) for prompt in FUNDUS_PROMPTS for number in range(2)]
    everything = serve(sampler, (selector, policy), 0.0, requests, candidates=5)
    scores = [one.selector for request in everything for one in request.kept]
    threshold = threshold_between(scores)
    again = [Request(prompt, number) for prompt in FUNDUS_PROMPTS for number in range(2)]
    served = serve(sampler, (selector, policy), threshold, again)
    assert len({round(score, 4) for score in scores}) > 10  # the judges tell images apart
    for request in served:
        everyone = next(r for r in everything if (r.prompt, r.repetition) == (request.prompt, request.repetition)).kept
        passing = [one.attempt for one in everyone if one.selector >= threshold][:2]
        if passing:
            assert [one.attempt for one in request.kept] == passing
            assert request.best.policy == max(one.policy for one in request.kept)
            assert request.attempts == (passing[1] + 1 if len(passing) == 2 else 5)
        else:
            assert [one.attempt for one in request.kept] == [4] and not request.best.passed


def test_names_carry_both_scores_and_scores_are_those_of_the_stored_images(sampler, judges_dir):
    judges = load_judges(judges_dir)
    (request,) = serve(sampler, judges, 0.0, [Request(FUNDUS_PROMPTS[0], 1)])
    entries = log_entries(request, max_attempts=5)
    assert sum(entry["best"] for entry, _ in entries) == 1
    for entry, image in entries:
        name = re.fullmatch(r"images/.+/Fundus_(\d+)_selector_(\d\.\d\d)_policy_(\d\.\d\d)\.png", entry["path_to_img"])
        pixels = image[None].float() / 255
        assert float(name[2]) == pytest.approx(judges[0].score(pixels).item(), abs=0.006)
        assert float(name[3]) == pytest.approx(judges[1].score(pixels, [entry["prompt"]]).item(), abs=0.006)
        assert 5 <= int(name[1]) < 10


def test_where_nothing_passes_the_last_image_is_kept(sampler, judges_dir):
    (request,) = serve(sampler, load_judges(judges_dir), 1.1, [Request(FUNDUS_PROMPTS[0], 0)], attempts=3)
    assert request.attempts == 3 and [one.attempt for one in request.kept] == [2] and not request.best.passed
    assert log_entries(request, 3)[0][0]["reward"] == "0.0000"


def test_the_reward_is_the_policys_score_of_what_passes(bert_pipeline_dir, tmp_path):
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [FUNDUS_PROMPTS[i % 2] for i in range(6)]
    selector, policy = load_judges(write_judges(tmp_path, bert_pipeline_dir, seed=3))
    quality, aligned = selector.score(images).double().numpy(), policy.score(images, prompts).double().numpy()
    selector.threshold = threshold_between(quality)
    save_selector(selector, tmp_path / SELECTOR_FILE)
    rewards, info = build_reward("fundus_alignment", {"fundus_alignment": {"judges": tmp_path}})(images, prompts, [])
    np.testing.assert_allclose(rewards, np.where(quality >= selector.threshold, aligned, 0), rtol=1e-5)
    np.testing.assert_allclose(info["selector"], quality, rtol=1e-5)
    assert 0 < (rewards > 0).sum() < 6


def test_the_prompts_of_a_table(table):
    assert [prompt for prompt, _ in all_prompts("fundus_table", path=str(table / "table.csv"))] == sorted(
        FUNDUS_PROMPTS
    )


def test_round_metrics_equal_those_computed_by_hand(judges_dir):
    selector, policy = load_judges(judges_dir)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    prompts = [FUNDUS_PROMPTS[0]] * 6 + [FUNDUS_PROMPTS[1]] * 6
    real = features_of(selector, torch.randint(0, 256, (9, 3, 32, 32), generator=generator, dtype=torch.uint8), 4)
    selector.threshold = threshold_between(selector.score(images.float() / 255))
    metrics = assess(images, prompts, selector, policy, real, seed=1, batch_size=5)
    assert 0 < metrics.pass_rate < 1
    pixels = images.float() / 255
    quality, aligned = selector.score(pixels), policy.score(pixels, prompts)
    passed = (quality >= selector.threshold).float()
    assert metrics.alignment == pytest.approx((passed * aligned).mean().item(), abs=1e-6)
    assert (metrics.images, metrics.pass_rate) == (12, pytest.approx(passed.mean().item()))
    assert metrics.kid == pytest.approx(kernel_distance(real, features_of(selector, images, 12), 1).value, abs=1e-9)
    with pytest.raises(UserError, match="3 drawn and 9 real images"):  # no error of KID to judge its rise by
        assess(images[:3], prompts[:3], selector, policy, real, seed=1, batch_size=5)
    pairs = [(i, i + 1) for i in range(11) if i != 5]
    similar = [ms_ssim(pixels[a, None], pixels[b, None]).item() for a, b in pairs]
    assert metrics.ms_ssim == pytest.approx(np.mean(similar), abs=1e-6)


def test_fixed_noise_depends_on_nothing_but_seed_prompt_and_index(sampler):
    both = draw_fixed(sampler, FUNDUS_PROMPTS, 3, seed=5, batch_size=4)
    alone = draw_fixed(sampler, FUNDUS_PROMPTS[1:], 2, seed=5, batch_size=1)
    assert both.dtype == torch.uint8
    assert (both[3:5].int() - alone.int()).abs().max() <= 1
    assert not torch.equal(both[:2], alone)


def metrics(alignment=0.5, kid=0.1, ms_ssim=0.2):
    return RoundMetrics(alignment, 0.5, 0.5, 0.5, kid, 0.01, ms_ssim, 100)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([metrics()], ""),
        ([metrics(), metrics(alignment=0.6, kid=0.12, ms_ssim=0.5)], ""),
        ([metrics(), metrics(alignment=0.6), metrics(alignment=0.57)], "0.570"),
        ([metrics(), metrics(alignment=0.6, kid=0.2)], "KID to real images rose from 0.1 to 0.2"),
        ([metrics(), metrics(alignment=0.6, ms_ssim=0.61)], "MS-SSIM rose from 0.200 to 0.610"),
    ],
)
def test_collapse(rounds, expected):
    said = collapse(rounds, tolerance=0.02, kid_tolerance=3.0)
    assert expected in said and bool(said) == bool(expected)


@pytest.fixture
def fields(table, bert_pipeline_dir, judges_dir, tmp_path):
    """Settings of generate.py and improve.py in the small."""
    held_out = tmp_path / "held-out-judges"
    held_out.mkdir()
    write_judges(held_out, bert_pipeline_dir, seed=4, threshold=0.1)
    settings = {"mixed_precision": "no", "pretrained__model": bert_pipeline_dir, "sample__num_steps": 2}
    settings |= {"sample__guidance_scale": 1.0, "prompt_fn": "fundus_table", "reward_fn": "fundus_alignment"}
    settings |= {"prompt_fn_kwargs__path": table / "table.csv", "eval__batch_size": 4, "log_with": ""}
    settings |= {"improve__judges": judges_dir, "improve__held_out_judges": held_out, "improve__images_per_prompt": 2}
    settings |= {"improve__csv": table / "table.csv", "improve__held_out_csv": table / "table.csv"}
    settings |= {"improve__data_path": table, "improve__num_steps": 2, "improve__batch_size": 4}
    settings |= {"improve__held_out_images": 4, "improve__rounds": 1, "improve__output": tmp_path / "improve"}
    settings |= {"improve__tolerance": 1.0, "improve__kid_tolerance": 1e9, "improve__max_attempts": 4}
    settings |= {"sd__image_size": 32, "sd__output": tmp_path / "none", "sd__text_encoder": "bert", "sd__grid_every": 0}
    settings |= {"num_epochs": 1, "sample__batch_size": 4, "sample__num_batches_per_epoch": 1, "train__batch_size": 4}
    settings |= {"eval__prompts": (), "save_freq": 1, "train__cfg": False, "sd__cache_dir": tmp_path / "cache"}
    return settings


@pytest.fixture
def run(run_main, config_file, fields):
    """Function (script, changes): run its main in this process with `fields` and these changes."""

    def main(script, **changes):
        kept = bool | int | float | tuple
        given = {name: value if isinstance(value, kept) else str(value) for name, value in (fields | changes).items()}
        run_main(script, config_file, **given)

    return main


def test_generate_draws_damaged_images_again(run, tmp_path, caplog):
    settings = {"logdir": tmp_path / "pool", "eval__prompts": (FUNDUS_PROMPTS[0],), "progress": False}
    run("generate.py", **settings)
    before = files_of(tmp_path / "pool")
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-50]), lambda path: path.unlink()):
        path = sorted((tmp_path / "pool").glob("images/*/*.png"))[-1]
        damage(path)
        run("generate.py", **settings)
        assert files_of(tmp_path / "pool") == before and path.name in caplog.text
        caplog.clear()


@pytest.mark.slow
def test_generate_writes_the_same_with_two_processes_and_once(config_file, fields, run, tmp_path):
    for folder, processes in (("one", 1), ("two", 2)):
        given = fields | {"logdir": tmp_path / folder, "eval__batch_size": 1}
        succeed("generate.py", *options(config_file, **given), processes=processes)
    one, two = (files_of(tmp_path / name / "images") for name in ("one", "two"))
    assert one == two and len(one) >= 4
    assert read_log(tmp_path / "one") == read_log(tmp_path / "two")
    run("generate.py", eval__batch_size=1, logdir=tmp_path / "one")
    assert files_of(tmp_path / "one" / "images") == one


@pytest.mark.slow
def test_rounds_resume(config_file, fields, tmp_path):
    fields["improve__methods"] = "('finetune','ddpo')"
    first = succeed("improve.py", *options(config_file, **fields))
    output = tmp_path / "improve"
    entries = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    assert [entry["round"] for entry in entries] == [0, 1] and entries[0]["alignment"] != entries[1]["alignment"]
    assert first.stdout.count("|") > 20 and (output / "rounds.md").read_text() == first.stdout.rstrip("\n") + "\n"
    assert (output / "best" / "model_index.json").is_file()
    # killed in the last step of round 1
    (output / "rounds.jsonl").write_text(json.dumps(entries[0]) + "\n")
    shutil.rmtree(output / "round_1" / "model")
    pool = (output / "round_1" / "pool" / "image_log.json").stat().st_mtime_ns
    again = succeed("improve.py", *options(config_file, **fields)).stderr
    assert again.count("done before") == 1 and (output / "round_1/pool/image_log.json").stat().st_mtime_ns == pool
    assert [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()] == entries


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"improve__methods": ("sft",)}, "improve.methods.*'sft'"),
        ({"improve__rounds": 0}, "improve.rounds.*0"),
        ({"improve__csv": ""}, "improve.csv"),
        ({"unet_path": "unet.safetensors"}, "unet_path.*pretrained.model"),
    ],
)
def test_settings_out_of_range(run, changes, message):
    with pytest.raises(UserError, match=message):
        run("improve.py", **changes)


def test_judges_that_choose_cannot_measure(run, fields):
    with pytest.raises(UserError, match="improve.held_out_judges"):
        run("improve.py", improve__held_out_judges=fields["improve__judges"])


def test_rounds_and_pools_belong_to_the_contents_of_their_files(
    run, config_file, fields, judges_dir, bert_pipeline_dir, tmp_path
):
    """At the same paths: another schedule, judge, table."""
    model, judges = (shutil.copytree(place, tmp_path / place.name) for place in (bert_pipeline_dir, judges_dir))
    table = Path(shutil.copy(fields["improve__csv"], tmp_path / "table.csv"))
    fields |= {"pretrained__model": model, "improve__judges": judges, "improve__csv": table}
    config = load_module(config_file).get_config()
    for name in ("pretrained__model", "improve__judges", "improve__csv", "improve__held_out_judges"):
        config.update_from_flattened_dict({name.replace("__", "."): str(fields[name])})
    config.improve.held_out_csv = str(fields["improve__held_out_csv"])
    before = round_settings(config)

    def changed():
        now = round_settings(config)
        return {name for name in now if now[name] != before[name]}

    assert not changed()
    run("generate.py", logdir=tmp_path / "pool")
    schedule = model / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"beta_end": 0.02}))
    assert changed() == {"model.scheduler"}
    with pytest.raises(UserError, match="model.scheduler"):
        run("generate.py", logdir=tmp_path / "pool")
    write_judges(judges, model, seed=5, threshold=0.1)
    assert changed() == {"model.scheduler", "contents.judges"}
    table.write_text(table.read_text() + "\n")
    assert changed() == {"model.scheduler", "contents.judges", "contents.csv"}
