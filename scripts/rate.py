"""Let experts rate images on a local web page that hides where an image comes from.

    python scripts/rate.py --images rl4med-out/samples/fundus --out rl4med-out/ratings.csv

shows the images of sample folders and of a fundus table, in a random order for each rater. Each click is saved at once
to --out and a journal next to it; rerun with the same --out to continue. When a rater finishes, and at the end, a
summary of the answers is written to <out>.summary.json, for metric.py's report (`metric.results`). The page can only be
reached from this machine unless --host 0.0.0.0 opens it to others with a token.
"""

import logging
import re
import secrets
import socket
from collections import Counter
from functools import partial
from pathlib import Path

from absl import flags

from ddpo_pytorch.data.images import RESIZES, SUFFIXES, is_synthetic
from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.metrics import readers
from ddpo_pytorch.rating.session import Item, Questions, distinct, pair_items, sample_items, table_items
from ddpo_pytorch.rating.store import Store, rater_name
from ddpo_pytorch.utils.cli import cli, expand, expand_flags
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import write_json
from ddpo_pytorch.utils.settings import Range, check_ranges

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("images", [], "sample folders of eval.py, separated by commas or repeated")
flags.DEFINE_string("csv", None, "fundus table (path,Text,modality) with more images")
flags.DEFINE_string("data_path", None, "folder that the paths in --csv are relative to")
flags.DEFINE_string("out", "rl4med-out/ratings.csv", "table of ratings, a .csv; continued if it exists")
flags.DEFINE_string("rater", None, "name of the only rater; by default the page asks for it")
flags.DEFINE_integer("expert_level", None, "1, 2 or 3, for all raters; by default the page asks", 1, 3)
flags.DEFINE_integer("image_size", 0, "side in pixels of displayed images; 0 = unchanged", 0, 4096)
flags.DEFINE_enum("resize", "pad", RESIZES, "how --image_size makes images square")
flags.DEFINE_string("host", "127.0.0.1", "address to listen on; any but loopback needs a token")
flags.DEFINE_integer("port", 0, "port to listen on; 0 = a free one", 0, 65535)
flags.DEFINE_string("token", None, "secret part of the address; generated if needed")
flags.DEFINE_enum("mode", "rate", ("rate", "real", "pair"), "rate, tell photographs from generated, or compare two")
flags.DEFINE_bool("criteria", False, "also ask for optic disc, vessels, contrast and artifacts (mode rate)")
flags.DEFINE_float("repeats", 0, "share, up to 0.5, of images that each rater sees a second time, unannounced")
flags.DEFINE_string("examples", None, "folder of reference images named by rating: 1..., 2... or 3...")
flags.DEFINE_integer("seed", 0, "seed of the order in which each rater sees the images", 0)

logger = logging.getLogger(__name__)


def find_items() -> tuple[list[Item], list[str]]:
    """Return the questions from all sources, and the sources' names. Raises UserError if there is nothing to ask."""
    if bool(FLAGS.csv) != bool(FLAGS.data_path):
        raise UserError("--csv and --data_path must be given together: a fundus table and the folder of its images")
    folders = map(expand, filter(None, ",".join(FLAGS.images).split(",")))
    sources = {folder: sample_items(folder, FLAGS.out) for folder in folders}
    if FLAGS.csv:
        sources[FLAGS.csv] = table_items(FLAGS.csv, FLAGS.data_path, FLAGS.out)
    items = [item for group in sources.values() for item in group]
    if not items:
        raise UserError("there are no images to rate; give --images FOLDER, or --csv TABLE with --data_path FOLDER")
    sizes = Counter(item.size for item in items)
    if len(sizes) > 1 and not FLAGS.image_size:
        one, other = ("{}x{}".format(*size) for size in list(sizes)[:2])
        logger.warning("images differ in size (%s, %s), which may reveal their source; see --image_size", one, other)
    names = [Path(name).name.removesuffix(".csv") for name in sources]
    names = names if len(set(names)) == len(names) else list(sources)
    if FLAGS.mode != "pair":
        return distinct(items), names
    if len(sources) != 2:
        raise UserError(f"--mode=pair compares two sources, got {len(sources)}; give two sample folders as --images")
    if not (pairs := pair_items(*sources.values())):
        raise UserError(f"{' and '.join(sources)} share no prompt; --mode=pair compares images of one prompt")
    return pairs, names


def main(_) -> None:
    try:
        from ddpo_pytorch.rating.server import is_loopback, listen, make_app, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise UserError(f'{error.name} is not installed; run: pip install -e ".[rate]"') from error

    expand_flags(FLAGS, ("out",), optional=("csv", "data_path", "examples"))
    rater = "" if FLAGS.rater is None else rater_name(FLAGS.rater)
    token = FLAGS.token or ("" if is_loopback(FLAGS.host) else secrets.token_urlsafe(32))
    if token and not re.fullmatch(r"[A-Za-z0-9_-]{16,128}", token):  # hard to guess, and valid in a URL
        raise UserError("--token needs 16 to 128 of the characters A-Z, a-z, 0-9, _ and -; omit it to generate one")
    # not by bounds of the flag, between which absl takes NaN to be
    check_ranges({"repeats": FLAGS.repeats}, {"repeats": Range("[0, 0.5]")}, "--")
    items, names = find_items()
    found = sorted(Path(FLAGS.examples).glob("[123]*")) if FLAGS.examples else []
    examples = [(int(path.name[0]), path) for path in found if path.suffix.lower() in SUFFIXES]  # (rating, file)
    if FLAGS.examples and not examples:
        raise UserError(f"--examples={FLAGS.examples!r} has no image whose name begins with 1, 2 or 3, like 3_ok.png")
    synthetic = {item.key: is_synthetic(item.path) for item in items} if FLAGS.mode == "real" else {}
    if synthetic and len(set(synthetic.values())) < 2:
        raise UserError("--mode=real needs photographs and images marked as generated; give folders of both")
    sock = listen(FLAGS.host, FLAGS.port)
    store, asked = Store(FLAGS.out, FLAGS.mode), {item.key for item in items}

    def summarise(reader: str = "") -> list[str]:
        """Write the summary of these questions; return its lines for one reader and all together, or for everybody."""
        answers = store.answers(asked)  # the table may have answers to others
        summaries = readers.summarise(answers, FLAGS.mode, partial(store.seconds, questions=asked), synthetic, names)
        estimates = {name: {key: one.to_dict() for key, one in result.items()} for name, result in summaries.items()}
        write_json(store.path.with_suffix(".summary.json"), estimates | {"title": readers.TITLES[FLAGS.mode]})
        if FLAGS.mode == "pair":
            rows = readers.preferences(answers)
            write_table(store.path.with_suffix(".preferences.csv"), ("prompt", "chosen", "rejected", "rater"), rows)
        shown = [(name, one) for name, one in summaries.items() if reader in ("", name) or name == readers.ALL]
        return readers.lines({"you" if name == reader else name: one for name, one in shown})

    questions = Questions(items, store, FLAGS.seed, FLAGS.repeats, examples, summarise)
    level, size = FLAGS.expert_level or 0, FLAGS.image_size or None
    app = make_app(
        questions, FLAGS.host, token, rater, level, FLAGS.mode, FLAGS.criteria, size=size, resize=FLAGS.resize
    )
    unit = "pairs" if FLAGS.mode == "pair" else "images"
    logger.info("%d %s; ratings go to %s, which has %d; Ctrl-C stops", len(items), unit, Path(FLAGS.out), len(store))
    name = socket.gethostname() if FLAGS.host in ("", "0.0.0.0", "::") else FLAGS.host
    name = f"[{name}]" if ":" in name else name
    logger.info("open http://%s:%d/%s", name, sock.getsockname()[1], f"?token={token}" if token else "")
    serve(app, sock)
    for line in summarise():
        logger.info("%s", line)
    questions.close()
    logger.info("%d ratings are in %s, every click in %s", len(store), store.path, store.journal)


if __name__ == "__main__":
    cli(main)
