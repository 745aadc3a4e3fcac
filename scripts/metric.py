"""Measure folders of images: alignment, fidelity, perception, diversity, memorisation; tables 2 and 3.

    accelerate launch --num_processes 1 scripts/metric.py --config config/dgx.py:evaluate_metric_rl --report

Writes metrics.json, per_image.csv, table2 and table3 (.md, .csv, .tex) and comparison.png to `metric.output`, appends
the official line {"metrics": {"APR_m", "LPIPS", "FID"}} to metrics_log.jsonl and, with --report, writes report.html.
All processes look at images; what their networks say is kept by content (`metric.cache_dir`), and the main process
computes the numbers from it, which therefore do not depend on the number of processes.
"""

import json
import logging
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.files import whole
from ddpo_pytorch.metrics.cautions import missing_of, warnings_of
from ddpo_pytorch.metrics.comparison import compare
from ddpo_pytorch.metrics.diversity import within_pairs
from ddpo_pytorch.metrics.evaluation import (
    Context,
    Folder,
    ceiling,
    measure_folder,
    set_facts,
    summarise,
    write_per_image,
)
from ddpo_pytorch.metrics.fidelity import pair_images
from ddpo_pytorch.metrics.measure import Side, matched, spread_size
from ddpo_pytorch.metrics.pictures import comparison, contact_sheet
from ddpo_pytorch.metrics.request import Sets, Tools, check_request, find_sets, load_tools
from ddpo_pytorch.metrics.sets import ImageSet, named_paths, shape_of
from ddpo_pytorch.metrics.store import FeatureStore
from ddpo_pytorch.metrics.tables import as_csv, latex, markdown, table2, table3
from ddpo_pytorch.report.page import write_report
from ddpo_pytorch.run import cli, make_accelerator

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "config/base.py", "Metrics of sample folders.")
flags.DEFINE_bool("report", False, "also write report.html, one page with tables, curves and pictures")

logger = logging.getLogger(__name__)


def look(title: str, images: ImageSet, store: FeatureStore, tools: Tools) -> Side:
    """What every network says about a set."""
    return Side(images, store.features(title, images, tools.networks))


def lpips_of(title: str, images: ImageSet, real: ImageSet | None, store: FeatureStore, tools: Tools, seed: int) -> dict:
    """Pairs (P, 2) and their LPIPS (P,): with real images of the same caption, and within the set."""
    if tools.lpips is None:
        return {}
    pairs = {"within": within_pairs(np.array(images.groups), seed, images.keys)}
    partners = {"within": images}
    if real is not None:
        own, theirs = ({path: i for i, path in enumerate(side.paths)} for side in (images, real))
        pairs["real"] = [(own[a], theirs[b]) for a, b, _ in pair_images(images.samples, real.samples, seed)]
        partners["real"] = real
    rows = {
        name: store.pairs(f"{title}: LPIPS {name}", images, partners[name], chosen, tools.lpips)
        for name, chosen in pairs.items()
    }
    return {name: (np.array(pairs[name]).reshape(-1, 2), rows[name][:][:, 0]) for name in pairs if len(rows[name])}


def ceiling_of(own: list[Folder], reference: Folder, seed: int) -> dict:
    """How far the judge agrees with real images in the mix of captions that a model's folders have."""
    quantity, share = ceiling([caption for f in own for caption in f.side.images.captions], reference, seed)
    return {"ceiling": quantity, "ceiling_share": share}


def describe(config: ConfigDict, tools: Tools, sides: dict, shape: tuple[int, int]) -> dict:
    """What metrics.json states beside the numbers: settings, versions, hashes, what is missing."""
    missing = {} if sides["real"] else {"FID, KID, LPIPS to real images": "metric.real_path is empty"}
    networks = [*tools.extractors.values(), *([tools.lpips] if tools.lpips else [])]
    return {
        "format": 2,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {n: version(n) for n in ("torch", "torchvision", "timm", "torch-fidelity", "lpips", "numpy")},
        "settings": config.metric.to_dict() | {"seed": config.seed, "image_shape": list(shape)},
        "judges": {
            name: {"what": network.what, "sha256": network.sha256, "labels": list(labels)}
            for name, (network, labels) in tools.judges.items()
        },
        "networks": {network.name: {"what": network.what, "sha256": network.sha256} for network in networks},
        "missing": tools.missing | missing,
        "sets": {name: set_facts(sides[name]) for name in ("real", "train") if sides[name]},
    }


def measure(config: ConfigDict, sets: Sets, tools: Tools, sides: dict, lpips: dict) -> tuple[dict, dict]:
    """metrics.json, and the measured folders by model."""
    metric, real, train = config.metric, sides["real"], sides["train"]
    models = {name: sides[name] for name in sets.models}
    every = [side for own in models.values() for side in own]
    parts = matched([side.images for side in ([real] if real else []) + every], config.seed)
    judges = {name: labels for name, (_, labels) in tools.judges.items()}
    per_group = spread_size([side.images for side in every])
    context = Context(judges, list(tools.extractors), real, train, per_group, config.seed)
    parts_of = iter(parts[1:]) if real else None
    folders = {
        name: [
            measure_folder(side, lpips[side.images.folder], (parts[0], next(parts_of)) if real else None, context)
            for side in own
        ]
        for name, own in models.items()
    }
    facts = {id(f): set_facts(f.side, context) for own in folders.values() for f in own}
    reference = measure_folder(real, {}, None, context) if real else None
    fid_part = "unmatched" if metric.fid == "compat" else "matched"
    result = describe(config, tools, sides, shape_of(every[0].images)) | {
        "warnings": warnings_of(context, folders, facts, parts),
        "models": {
            name: summarise(own, fid_part)
            | {"folders": [facts[id(f)] | {"made_with": dict(f.side.images.made_with)} for f in own]}
            | {"black_images": sum(facts[id(f)]["black_images"] for f in own)}
            | {"images_by_prompt": {c: sum(f.side.images.captions.count(c) for f in own) for c in CAPTIONS}}
            | {"missing": missing_of(own, context)}
            | (ceiling_of(own, reference, config.seed) if reference else {})
            for name, own in folders.items()
        },
        "judge_labels": list(judges[next(iter(judges))]),
        "fid_part": fid_part,
    }
    first = next(iter(folders))
    result["comparisons"] = [
        {"from": first, "to": name} | compare(folders[first], own, config.seed)
        for name, own in folders.items()
        if name != first
    ]
    if real:
        folders = {"real": [reference]} | folders
        result["real"] = summarise([reference], fid_part)
    return json.loads(json.dumps(result, default=lambda quantity: quantity.to_dict())), folders


def write(config: ConfigDict, result: dict, folders: dict[str, list[Folder]]) -> dict[str, str]:
    """Write the report's files and append the official line, whose APR is a ratio. Returns the tables in Markdown."""
    output, models = Path(config.metric.output), result["models"]
    output.mkdir(parents=True, exist_ok=True)
    counts = result["sets"]["real"]["images_by_prompt"] if "real" in result["sets"] else None
    tables = {
        "table2": table2(models, result.get("real"), counts),
        "table3": table3(models, result["fid_part"]),
    }
    texts = {f"{name}.{suffix}": form(table) for name, table in tables.items() for suffix, form in
             (("md", markdown), ("csv", as_csv), ("tex", latex))}  # fmt: skip
    numbers = {"metrics.json": json.dumps(result, indent=1, allow_nan=False) + "\n"}
    for name, text in (numbers | texts).items():
        with whole(output / name) as temporary:
            temporary.write_text(text)
    write_per_image(output / "per_image.csv", folders)
    comparison({name: own[0].side.images.samples for name, own in folders.items()}).save(output / "comparison.png")
    for name, model in models.items():
        for extractor, block in (model.get("memorisation") or {}).items():
            contact_sheet(block["closest"]).save(output / f"closest_{extractor}_{name.replace('/', '_')}.png")
    last = models[list(models)[-1]]
    with open(output / "metrics_log.jsonl", "a") as file:
        file.write(json.dumps({"metrics": {"APR_m": last["APR"], "LPIPS": last["LPIPS"], "FID": last["FID"]}}) + "\n")
    return {name: texts[f"{name}.md"] for name in tables}


def main(_) -> None:
    config = FLAGS.config
    metric = config.metric
    check_request(metric)
    accelerator = make_accelerator("no", config.allow_tf32)
    sets = find_sets(metric, accelerator)
    tools = load_tools(metric, accelerator)
    store = FeatureStore(Path(metric.cache_dir), accelerator, metric.batch_size, config.progress)

    # every process: networks look at images
    sides: dict = {"real": None, "train": None}
    for name, images in (("real", sets.real), ("train", sets.train)):
        if images is not None:
            sides[name] = look(f"{name} images", images, store, tools)
    lpips = {}
    for name, own in sets.models.items():
        sides[name] = [look(name, images, store, tools) for images in own]
        lpips |= {images.folder: lpips_of(name, images, sets.real, store, tools, config.seed) for images in own}
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    # the main process alone: numbers from what they said
    result, folders = measure(config, sets, tools, sides, lpips)
    for line in result["warnings"]:
        logger.warning("%s", line)
    for row in result["comparisons"]:
        if not row["paired"]:
            logger.warning("%s and %s are compared without pairs: %s", row["from"], row["to"], row["reason"])
    tables = write(config, result, folders)
    if "real" in result:
        for name, model in result["models"].items():
            if (agreed := model["ceiling"]["value"]) is not None:
                logger.info("on real images in the prompt mix of %s the judge finds APR %.2f %%", name, 100 * agreed)
    print(f"Table 2\n\n{tables['table2']}\nTable 3\n\n{tables['table3']}")  # the product of this command
    if FLAGS.report:
        samples = {name: own[0].side.images.samples for name, own in folders.items()}
        runs = [Path(path) for _, path in named_paths(metric.logs, "metric.logs")]
        logger.info("report: %s", write_report(Path(metric.output), result, samples, runs))
    logger.info("written to %s", metric.output)


if __name__ == "__main__":
    cli(main)
