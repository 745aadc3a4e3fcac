"""Measure folders of images: alignment, fidelity, perception, diversity, memorisation, image statistics; tables.

    accelerate launch --num_processes 1 scripts/metric.py --config config/dgx.py:evaluate_metric_rl --report

Writes metrics.json, per_image.csv, tables (.md, .csv, .tex) and comparison.png to `metric.output`, appends the official
line {"metrics": {"APR_m", "LPIPS", "FID"}} to metrics_log.jsonl and, with --report, writes report.html. The tables are
table2 and table3, or of fundus images, whose judges `metric.judges` names, fundus; with `metric.quality` also table1.
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
from accelerate import Accelerator
from ml_collections import ConfigDict

from ddpo_pytorch.data.images import save_picture
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
from ddpo_pytorch.metrics.feature_store import FeatureStore
from ddpo_pytorch.metrics.fidelity import pair_images
from ddpo_pytorch.metrics.fundus import JUDGES as FUNDUS
from ddpo_pytorch.metrics.fundus import Structure
from ddpo_pytorch.metrics.fundus_networks import SELECTOR
from ddpo_pytorch.metrics.fundus_tables import fundus_table, table1
from ddpo_pytorch.metrics.image_sets import ImageSet, named_paths, shape_of
from ddpo_pytorch.metrics.inputs import Sets, Tools, check_request, find_sets, load_tools
from ddpo_pytorch.metrics.measures import Side, matched, spread_size
from ddpo_pytorch.metrics.pictures import comparison, contact_sheet
from ddpo_pytorch.metrics.ssim import MOST_PAIRS, circle_pairs, pairs_by_name
from ddpo_pytorch.metrics.tables import Table, as_csv, latex, markdown, table2, table3
from ddpo_pytorch.report.page import write_report
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import locked_by_main, make_accelerator
from ddpo_pytorch.utils.files import JsonLines, atomic_write
from ddpo_pytorch.utils.settings import SEED, check_ranges

FLAGS = flags.FLAGS
define_config(__file__, "Metrics of sample folders.")
flags.DEFINE_bool("report", False, "also write report.html, one page with tables, curves and pictures")

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "torch-fidelity", "lpips", "numpy")
TITLES = {"table1": "Table 1", "table2": "Table 2", "table3": "Table 3", "fundus": "Fundus images"}


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


def structure_of(
    title: str, images: ImageSet, partners: ImageSet | None, store: FeatureStore, tools: Tools, seed: int
) -> Structure:
    """SSIM of images of equal names here and in `partners`, MS-SSIM of own pairs (see `fundus.Structure`)."""
    wanted: dict[str, tuple[str, ImageSet, list[tuple[int, int]]]] = {}
    if "ssim" in tools.structure and partners is not None:
        pairs = pairs_by_name(images.keys, partners.keys, f"metric.pairs_path={str(partners.folder)!r}")
        if len(pairs) < len(images):
            logger.warning("%s: SSIM is of %d of %d images, others have no partner", title, len(pairs), len(images))
        wanted["SSIM"] = ("ssim", partners, pairs)
    if "ms_ssim" in tools.structure:
        wanted["MS_SSIM"] = ("ms_ssim", images, circle_pairs(images.keys, seed))
        within = within_pairs(np.array(images.groups), seed, images.keys)[:MOST_PAIRS]
        wanted["MS_SSIM_within"] = ("ms_ssim", images, within)
    rows = {
        name: store.pairs(f"{title}: {name}", images, others, pairs, tools.structure[network])
        for name, (network, others, pairs) in wanted.items()
    }
    return {name: (np.array(wanted[name][2]), rows[name][:][:, 0]) for name in wanted if len(rows[name])}


def ceiling_of(own: list[Folder], reference: Folder, seed: int) -> dict:
    """How far the judge agrees with real images in the mix of captions that a model's folders have."""
    quantity, share = ceiling([caption for f in own for caption in f.side.images.captions], reference, seed)
    return {"ceiling": quantity, "ceiling_share": share}


def describe(config: ConfigDict, tools: Tools, sides: dict, shape: tuple[int, int]) -> dict:
    """What metrics.json states beside the numbers: settings, versions, hashes, what is missing."""
    missing = {} if sides["real"] else {"FID, KID, LPIPS to real images": "metric.real_path is empty"}
    lpips = [tools.lpips] if tools.lpips else []
    networks = [*tools.extractors.values(), *lpips, *tools.statistics, *tools.structure.values()]
    judges = {
        name: {"what": network.what, "sha256": network.sha256, "labels": list(labels)}
        for name, (network, labels) in tools.judges.items()
    }
    kind = {}
    if tools.fundus is not None:
        kind, judges[SELECTOR]["threshold"] = {"kind": FUNDUS}, tools.fundus.threshold
    return kind | {
        "format": 2,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: version(name) for name in PACKAGES + (("scipy",) if config.metric.quality else ())},
        "settings": config.metric.to_dict() | {"seed": config.seed, "image_shape": list(shape)},
        "judges": judges,
        "networks": {network.name: {"what": network.what, "sha256": network.sha256} for network in networks},
        "missing": tools.missing | missing,
        "sets": {name: set_facts(sides[name]) for name in ("real", "train") if sides[name]},
    }


def measure(
    config: ConfigDict, sets: Sets, tools: Tools, sides: dict, lpips: dict, pairwise: dict
) -> tuple[dict, dict]:
    """metrics.json, and the measured folders by model. `lpips` and `pairwise` hold pairs by folder."""
    metric, real, train = config.metric, sides["real"], sides["train"]
    models = {name: sides[name] for name in sets.models}
    every = [side for own in models.values() for side in own]
    parts = matched([side.images for side in ([real] if real else []) + every], config.seed)
    judges = {name: labels for name, (_, labels) in tools.judges.items() if labels}
    per_group = spread_size([side.images for side in every])
    threshold = tools.fundus.threshold if tools.fundus is not None else None
    context = Context(
        judges, list(tools.extractors), real, train, per_group, config.seed, threshold, tuple(metric.quality)
    )
    parts_of = iter(parts[1:]) if real else None
    folders = {
        name: [
            measure_folder(
                side,
                lpips[side.images.folder],
                (parts[0], next(parts_of)) if real else None,
                context,
                pairwise[side.images.folder],
            )
            for side in own
        ]
        for name, own in models.items()
    }
    vocabulary = every[0].images.vocabulary
    facts = {id(f): set_facts(f.side, context) for own in folders.values() for f in own}
    reference = measure_folder(real, {}, None, context, pairwise[real.images.folder]) if real else None
    fid_part = "unmatched" if metric.fid == "compat" else "matched"
    result = describe(config, tools, sides, shape_of(every[0].images)) | {
        "warnings": warnings_of(context, folders, facts, parts),
        "models": {
            name: summarise(own, fid_part)
            | {"folders": [facts[id(f)] | {"made_with": dict(f.side.images.made_with)} for f in own]}
            | {"black_images": sum(facts[id(f)]["black_images"] for f in own)}
            | {"images_by_prompt": {c: sum(f.side.images.captions.count(c) for f in own) for c in vocabulary}}
            | {"missing": missing_of(own, context)}
            | (ceiling_of(own, reference, config.seed) if reference else {})
            for name, own in folders.items()
        },
    }
    if judges:
        result["judge_labels"] = list(next(iter(judges.values())))
    result["fid_part"] = fid_part
    first = next(iter(folders))
    result["comparisons"] = [
        {"from": first, "to": name} | compare(folders[first], own, config.seed, context.key)
        for name, own in folders.items()
        if name != first
    ]
    if real:
        folders = {"real": [reference]} | folders
        result["real"] = summarise([reference], fid_part)
    return json.loads(json.dumps(result, default=lambda quantity: quantity.to_dict())), folders


def make_tables(result: dict) -> dict[str, Table]:
    """The tables of metrics.json by name."""
    models, real, tables = result["models"], result.get("real"), {}
    if names := result["settings"]["quality"]:
        tables["table1"] = table1(models, real, names, result["settings"]["image_shape"])
    if result.get("kind") == FUNDUS:
        return tables | {"fundus": fundus_table(models, real, result["fid_part"])}
    counts = result["sets"]["real"]["images_by_prompt"] if "real" in result["sets"] else None
    return tables | {"table2": table2(models, real, counts), "table3": table3(models, result["fid_part"])}


def write(config: ConfigDict, result: dict, folders: dict[str, list[Folder]]) -> dict[str, str]:
    """Write the report's files and append the official line, whose APR is a ratio. Returns the tables in Markdown."""
    output, models = Path(config.metric.output), result["models"]
    fundus, tables = result.get("kind") == FUNDUS, make_tables(result)
    texts = {f"{name}.{suffix}": form(table) for name, table in tables.items() for suffix, form in
             (("md", markdown), ("csv", as_csv), ("tex", latex))}  # fmt: skip
    numbers = {"metrics.json": json.dumps(result, indent=1, allow_nan=False) + "\n"}
    for name, text in (numbers | texts).items():
        with atomic_write(output / name) as temporary:
            temporary.write_text(text)
    write_per_image(output / "per_image.csv", folders, "alignment" if fundus else "aligned")
    samples = {name: own[0].side.images.samples for name, own in folders.items()}
    save_picture(output / "comparison.png", comparison(samples))
    for name, model in models.items():
        for extractor, block in (model.get("memorisation") or {}).items():
            path = output / f"closest_{extractor}_{name.replace('/', '_')}.png"
            save_picture(path, contact_sheet(block["closest"]))
    last = models[list(models)[-1]]
    score = {"fundus_alignment": last["fundus_alignment"]} if fundus else {"APR_m": last["APR"]}
    JsonLines(output / "metrics_log.jsonl").write({"metrics": score | {"LPIPS": last["LPIPS"], "FID": last["FID"]}})
    return {name: texts[f"{name}.md"] for name in tables}


def main(_) -> None:
    config = expand_config(FLAGS.config, "metric.output", "metric.cache_dir")
    metric = config.metric
    check_ranges(config, {"seed": SEED})
    check_request(metric)
    accelerator = make_accelerator("no", config.allow_tf32, process_timeout=config.process_timeout)
    with locked_by_main(accelerator, metric.output, "another metric.output"):
        evaluate(accelerator, config)


def evaluate(accelerator: Accelerator, config: ConfigDict) -> None:
    """Look at all images, measure, and write the report."""
    metric = config.metric
    sets = find_sets(metric, accelerator)
    tools = load_tools(metric, accelerator, min(shape_of(next(iter(sets.models.values()))[0])))
    store = FeatureStore(Path(metric.cache_dir), accelerator, metric.batch_size, config.progress)

    # every process: networks look at images
    sides: dict = {"real": None, "train": None}
    for name, images in (("real", sets.real), ("train", sets.train)):
        if images is not None:
            sides[name] = look(f"{name} images", images, store, tools)
    lpips, pairwise = {}, {}
    if sets.real is not None:
        pairwise[sets.real.folder] = structure_of("real images", sets.real, None, store, tools, config.seed)
    for name, own in sets.models.items():
        sides[name] = [look(name, images, store, tools) for images in own]
        lpips |= {images.folder: lpips_of(name, images, sets.real, store, tools, config.seed) for images in own}
        pairwise |= {images.folder: structure_of(name, images, sets.pairs, store, tools, config.seed) for images in own}
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    # the main process alone: numbers from what they said
    result, folders = measure(config, sets, tools, sides, lpips, pairwise)
    for line in result["warnings"]:
        logger.warning("%s", line)
    for row in result["comparisons"]:
        if not row["paired"]:
            logger.warning("%s and %s are compared without pairs: %s", row["from"], row["to"], row["reason"])
    tables = write(config, result, folders)
    if "real" in result:
        for name, model in result["models"].items():
            if (agreed := model["ceiling"]["value"]) is not None:
                what = "alignment" if tools.fundus is not None else "APR"
                logger.info(
                    "on real images in the prompt mix of %s the judge finds %s %.2f %%", name, what, 100 * agreed
                )
    print("\n".join(f"{TITLES[name]}\n\n{table}" for name, table in tables.items()))  # the product of this command
    if FLAGS.report:
        samples = {name: own[0].side.images.samples for name, own in folders.items()}
        runs = [Path(path) for _, path in named_paths(metric.logs, "metric.logs")]
        logger.info("report: %s", write_report(Path(metric.output), result, samples, runs))
    logger.info("written to %s", metric.output)


if __name__ == "__main__":
    cli(main)
