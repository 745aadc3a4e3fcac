"""Measure folders of images: alignment, fidelity, perception, diversity, memorisation, image statistics; tables.

    accelerate launch --num_processes 1 scripts/metric.py --config config/dgx.py:evaluate_metric_rl --report

Writes metrics.json, per_image.csv, tables (.md, .csv, .tex) and comparison.png to `metric.output`, appends the official
line {"metrics": {"APR_m", "LPIPS", "FID"}} to metrics_log.jsonl and, with --report, writes report.html. The tables are
table3 and, for ISIC captions, table2; fundus for fundus images (`metric.judges`); and table1 with `metric.quality`.

All processes run networks, with results cached by content (`metric.cache_dir`); the main process computes the numbers.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from absl import flags
from accelerate import Accelerator
from ml_collections import ConfigDict

from ddpo_pytorch.data.images import save_picture
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.data.tables import number
from ddpo_pytorch.metrics.comparison import Folder
from ddpo_pytorch.metrics.evaluation import FUNDUS, evaluate, run_networks, write_per_image
from ddpo_pytorch.metrics.image_sets import named_paths
from ddpo_pytorch.metrics.inputs import check_request, find_sets, load_tools, read_results
from ddpo_pytorch.metrics.pictures import comparison, contact_sheet
from ddpo_pytorch.metrics.sanity import sanity_sets
from ddpo_pytorch.metrics.tables import dig, main_tables, to_csv, to_latex, to_markdown
from ddpo_pytorch.report.findings import sanity_table
from ddpo_pytorch.report.page import write_report
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import locked_by_main, make_accelerator
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import JsonLines, write_file
from ddpo_pytorch.utils.settings import SEED, check_ranges

FLAGS = define_config(__file__, "experiment, e.g. config/dgx.py:evaluate_metric_rl")
flags.DEFINE_bool("report", False, "also write report.html, one page with tables, curves and pictures")
flags.DEFINE_bool("sanity", False, "also measure degraded real images: what each metric can detect at this n")
flags.DEFINE_multi_string("fail_if", [], "exit with code 2 if this holds for the last model: 'APR<0.4', 'FID>30', ...")

logger = logging.getLogger(__name__)

TITLES = {"table1": "Table 1", "table2": "Table 2", "table3": "Table 3", "fundus": "Fundus images"}
TITLES["sanity"] = "Half of the real images, degraded, against the other half"


def check_conditions(result: dict, conditions: Sequence[tuple[str, str, float]]) -> None:
    """Raise UserError if a condition holds for the last model, or names no number in its part of metrics.json."""
    name, model = list(result["models"].items())[-1]
    for path, sign, bound in conditions:
        value = dig(model, *path.split("."))
        value = value["value"] if isinstance(value, dict) and "value" in value else value
        if not isinstance(value, int | float):
            raise UserError(f"--fail_if: metrics.json has no number {path!r} for {name}; look up its names there")
        if value < bound if sign == "<" else value > bound:
            raise UserError(f"{path} of {name} is {value:.4g}, as forbidden by --fail_if='{path}{sign}{bound:g}'")


def write(output: Path, result: dict, folders: dict[str, list[Folder]], tables: dict[str, pd.DataFrame]) -> None:
    """Write metrics, tables and contact sheets, and append the official line, in which APR is a ratio."""
    models = result["models"]
    write_file(output / "metrics.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    for name, table in tables.items():
        for suffix, convert in {"md": to_markdown, "csv": to_csv, "tex": to_latex}.items():
            write_file(output / f"{name}.{suffix}", convert(table))
    write_per_image(output / "per_image.csv", folders)
    for name, model in models.items():
        for space, block in (model.get("memorisation") or {}).items():
            save_picture(output / f"closest_{space}_{folder_name(name)}.png", contact_sheet(block["closest"]))
    last = list(models.values())[-1]
    fundus = result.get("kind") == FUNDUS
    score = {"fundus_alignment": last["fundus_alignment"]} if fundus else {"APR_m": last["APR"]}
    JsonLines(output / "metrics_log.jsonl").write({"metrics": score | {"LPIPS": last["LPIPS"], "FID": last["FID"]}})


def measure(accelerator: Accelerator, config: ConfigDict) -> dict:
    """Run the networks on all processes; compute, write and return the content of metrics.json on the main process."""
    metric = config.metric
    sets = find_sets(metric, accelerator)
    tools = load_tools(metric, accelerator, sets)
    run_networks(config, sets, tools, accelerator)
    if FLAGS.sanity:
        checked, missing = sanity_sets(sets, Path(metric.cache_dir) / "sanity", config.seed, accelerator)
        run_networks(config, checked, tools, accelerator)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return {}

    result, folders = evaluate(config, tools, sets)
    result["results"] = read_results(metric.results)
    if FLAGS.sanity:
        result["sanity"] = {"missing": missing, "models": evaluate(config, tools, checked)[0]["models"]}
    for line in result["warnings"]:
        logger.warning("%s", line)
    for row in result["comparisons"]:
        if not row["paired"]:
            logger.warning("%s and %s are compared without pairs: %s", row["from"], row["to"], row["reason"])
    tables, output = main_tables(result), Path(metric.output)
    if FLAGS.sanity:
        tables["sanity"] = sanity_table(result)[0].reset_index(names="")
    samples = {name: measured[0].images.samples for name, measured in folders.items()}  # of each model's first folder
    save_picture(output / "comparison.png", comparison(samples))
    write(output, result, folders, tables)
    print("\n".join(f"{TITLES[name]}\n\n{to_markdown(table)}" for name, table in tables.items()))
    if FLAGS.report:
        logger.info("report: %s", write_report(output, result, samples, dict(named_paths(metric.logs, "metric.logs"))))
    logger.info("written to %s", output)
    return result


def main(_) -> None:
    conditions = []  # path, comparison, number
    for text in FLAGS.fail_if:
        match = re.fullmatch(r"\s*(.+?)\s*([<>])\s*(\S+)\s*", text)
        if not match or number(match[3]) is None:
            raise UserError(f"--fail_if={text!r} is not a condition; give NAME<NUMBER or NAME>NUMBER, e.g. 'APR<0.4'")
        conditions.append((match[1], match[2], float(match[3])))
    config = expand_config(FLAGS.config, "metric.output", "metric.cache_dir")
    check_ranges(config, {"seed": SEED})
    check_request(config.metric)
    if FLAGS.sanity and not config.metric.real_path:
        raise UserError("--sanity degrades real images, but metric.real_path is empty; give their folder")
    accelerator = make_accelerator("no", config.allow_tf32, process_timeout=config.process_timeout)
    with locked_by_main(accelerator, config.metric.output, "another metric.output"):
        result = measure(accelerator, config)
        if accelerator.is_main_process:
            check_conditions(result, conditions)


if __name__ == "__main__":
    cli(main)
