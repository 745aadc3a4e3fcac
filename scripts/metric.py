"""Measure generated samples: APR (tables 2 and 3), FID and LPIPS against real images.

    accelerate launch --num_processes 1 scripts/metric.py --config config/dgx.py:evaluate_metric_rl

Prints the paper's tables and writes metrics.json, table2.md, table3.md and comparison.png to `metric.output`, where the
official line {"metrics": {"APR_m", "LPIPS", "FID"}} is appended to metrics_log.jsonl. Any number of processes gives the
same numbers.
"""

import json
import logging
from importlib.metadata import version
from pathlib import Path

from absl import flags
from accelerate import Accelerator
from ml_collections import ConfigDict, config_flags

from ddpo_pytorch.data.images import list_samples, load_image, read_log
from ddpo_pytorch.data.isic import CAPTIONS, caption_of_folder, folder_name
from ddpo_pytorch.data.sample_log import read_settings
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.metrics.fidelity import lpips_by_prompt, weighted_mean
from ddpo_pytorch.metrics.measure import Instruments, Measured, Samples, lpips_sums, measure
from ddpo_pytorch.metrics.networks import inception_features, lpips_distance
from ddpo_pytorch.metrics.report import comparison, table2, table3
from ddpo_pytorch.run import cli, make_accelerator

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "config/base.py", "Metrics of sample folders.")

logger = logging.getLogger(__name__)

INCEPTION_FEATURES = 2048


def find_sets(metric: ConfigDict) -> tuple[Samples, dict[str, Samples]]:
    """Real samples ([] when no folder is given), and generated ones by name: compare_path's, then fake_path's."""
    prompts = [caption_of_folder(folder_name(prompt)) for prompt in metric.prompts]
    if not metric.fake_path:
        raise UserError("metric.fake_path is empty; give the folder that eval.py wrote, --config.metric.fake_path=DIR")
    sets = {metric.fake_name: list_samples(metric.fake_path, prompts)}
    if metric.compare_path and (Path(metric.compare_path) / "images").is_dir():
        if metric.compare_name == metric.fake_name:
            raise UserError(f"metric.compare_name and metric.fake_name are both {metric.fake_name!r}; name them apart")
        sets = {metric.compare_name: list_samples(metric.compare_path, prompts)} | sets
    elif metric.compare_path:
        logger.info("%s is left out: there are no samples in %s", metric.compare_name, metric.compare_path)
    if not metric.real_path:
        logger.info("FID, LPIPS and FD-judge are n/a: metric.real_path is empty")
    return (list_samples(metric.real_path, prompts) if metric.real_path else []), sets


def set_up(config: ConfigDict, accelerator: Accelerator, shape: tuple[int, int], compare_to_real: bool) -> Instruments:
    """Load the judge and, where there are real images to compare with, the networks of FID and LPIPS."""
    metric, device = config.metric, accelerator.device
    if metric.batch_size < 1:
        raise UserError(f"metric.batch_size is {metric.batch_size}; it must be at least 1")
    if not metric.classifier:
        raise UserError("metric.classifier is empty; give the H=4 judge, --config.metric.classifier=FILE")
    judge = load_classifier(metric.classifier, device)
    extractors, lpips = {}, None
    if compare_to_real:
        extractors = {"FD_judge": judge.features}
        with accelerator.main_process_first():  # one process downloads, the others find the file
            inception = inception_features(metric.inception, device)
            lpips = lpips_distance(metric.alexnet, device)
        if inception is not None:
            extractors["FID"] = inception
    return Instruments(accelerator, judge, extractors, lpips, shape, metric.batch_size, config.progress)


def evaluate(
    folder: str, fake: Samples, real: Samples, seed: int, tools: Instruments, real_side: Measured | None
) -> dict:
    """All metrics of one generated set, None where one could not be measured."""
    measured = measure(fake, tools, "judging")
    sums, counts = lpips_sums(fake, real, seed, tools), measured.counts
    if "FID" in tools.extractors and min(len(fake), len(real)) <= INCEPTION_FEATURES:
        logger.info("FID of %s rests on %d and %d images; below 10,000 its bias is large", folder, len(fake), len(real))
    return {
        "path": folder,
        "images": counts.total,
        "APR": counts.apr(),
        "FID": measured.distance(real_side, "FID"),
        "LPIPS": weighted_mean(sums),
        "FD_judge": measured.distance(real_side, "FD_judge"),
        "reward": mean_reward(folder, {caption for _, caption in fake}),
        "LPIPS_pairs": int(sums[:, 1].sum()),
        "label_accuracy": counts.label_accuracy(),
        "APR_by_prompt": counts.apr_by_prompt(),
        "LPIPS_by_prompt": lpips_by_prompt(sums, CAPTIONS),
        "images_by_prompt": counts.images_by_prompt(),
        "made_with": read_settings(folder),
    }


def mean_reward(folder: str, captions: set[str]) -> float | None:
    """Mean of the rewards that eval.py logged for images of these captions; None if it had no classifier."""
    entries = [entry for entry in read_log(folder) if entry["prompt"] in captions]
    rewards = [float(entry["reward"]) for entry in entries if entry.get("reward") is not None]
    return sum(rewards) / len(rewards) if rewards else None


def write(config: ConfigDict, result: dict, tables: dict[str, str]) -> None:
    """Write the report files and append the official line, whose APR is a ratio."""
    output = Path(config.metric.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, text in tables.items():
        (output / f"{name}.md").write_text(text)
    main = result["models"][config.metric.fake_name]
    line = {"metrics": {"APR_m": main["APR"], "LPIPS": main["LPIPS"], "FID": main["FID"]}}
    with open(output / "metrics_log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def main(_) -> None:
    config = FLAGS.config
    metric = config.metric
    if not metric.output:
        raise UserError("metric.output is empty; give the folder for the tables, --config.metric.output=DIR")
    accelerator = make_accelerator("no", config.allow_tf32)
    real, sets = find_sets(metric)
    shape = tuple(load_image(sets[metric.fake_name][0][0]).shape[1:])
    tools = set_up(config, accelerator, shape, bool(real))
    folders = {metric.compare_name: metric.compare_path, metric.fake_name: metric.fake_path}

    real_side = measure(real, tools, "real images") if real else None
    models = {name: evaluate(folders[name], fake, real, config.seed, tools, real_side) for name, fake in sets.items()}
    result = {"models": models, "settings": metric.to_dict() | {"seed": config.seed, "image_shape": shape}}
    result["judge_labels"] = tools.judge.labels
    result["versions"] = {name: version(name) for name in ("torch", "torchvision", "timm", "torch-fidelity", "lpips")}
    if real_side is not None:
        counts = real_side.counts
        result["real"] = {"images": counts.total, "APR": counts.apr(), "label_accuracy": counts.label_accuracy()}
        result["real"]["images_by_prompt"] = counts.images_by_prompt()
        logger.info("the judge agrees with the captions of %.2f %% of the real images", 100 * counts.apr())
    if accelerator.is_main_process:
        real_images = real_side.counts.images_by_prompt() if real_side else None
        tables = {"table2": table2(models, real_images), "table3": table3(models)}
        write(config, result, tables)
        comparison(sets).save(Path(metric.output) / "comparison.png")
        print(f"Table 2\n\n{tables['table2']}\nTable 3\n\n{tables['table3']}")  # the product of this command
        logger.info("written to %s", metric.output)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
