"""Let experts rate images 1, 2 or 3 on a local web page, blind to where an image comes from.

    python scripts/rate.py --images rl4med-out/samples/fundus --out rl4med-out/ratings.csv

shows the images of sample folders and of a fundus table, in a random order for each rater. Each click is saved at once
to --out and a journal next to it; rerun with the same --out to continue. The page is reachable from this machine only,
or from others with a token: --host 0.0.0.0.
"""

import logging
import re
import secrets
import socket
from collections import Counter, defaultdict
from pathlib import Path

from absl import flags

from ddpo_pytorch.data.images import RESIZES, is_synthetic
from ddpo_pytorch.data.ratings import fleiss_kappa
from ddpo_pytorch.metrics.intervals import exact_binomial
from ddpo_pytorch.rating.session import Item, Questions, distinct, sample_items, table_items
from ddpo_pytorch.rating.store import Store, rater_name
from ddpo_pytorch.utils.cli import cli, expand, expand_flags
from ddpo_pytorch.utils.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("images", [], "sample folders of eval.py, separated by commas or repeated")
flags.DEFINE_string("csv", None, "fundus table (path,Text,modality) of further images")
flags.DEFINE_string("data_path", None, "folder that the paths of --csv start from")
flags.DEFINE_string("out", "rl4med-out/ratings.csv", "table of ratings, a .csv; it is continued if it exists")
flags.DEFINE_string("rater", None, "name of the only rater; by default the page asks for it")
flags.DEFINE_integer("expert_level", None, "1, 2 or 3, of all raters; by default the page asks", 1, 3)
flags.DEFINE_integer("image_size", 0, "side in pixels of the images shown; 0 = as they are", 0, 4096)
flags.DEFINE_enum("resize", "pad", RESIZES, "how --image_size makes a square of an image")
flags.DEFINE_string("host", "127.0.0.1", "address to listen on; others than this machine's own need a token")
flags.DEFINE_integer("port", 0, "port to listen on; 0 = a free one", 0, 65535)
flags.DEFINE_string("token", None, "secret part of the address; generated if it is needed")
flags.DEFINE_enum("mode", "rate", ("rate", "real"), "rate images, or tell photographs from generated ones")
flags.DEFINE_integer("seed", 0, "seed of the order in which each rater sees the images", 0)

logger = logging.getLogger(__name__)


def find_items() -> list[Item]:
    """Return the images of all sources."""
    if bool(FLAGS.csv) != bool(FLAGS.data_path):
        raise UserError("--csv and --data_path belong together: a fundus table and the folder of its images")
    items = []
    for folder in (part for given in FLAGS.images for part in given.split(",") if part):
        items += sample_items(expand(folder), FLAGS.out)
    if FLAGS.csv:
        items += table_items(FLAGS.csv, FLAGS.data_path, FLAGS.out)[0]
    if not items:
        raise UserError("there are no images to rate; give --images FOLDER, or --csv TABLE with --data_path FOLDER")
    sizes = Counter(item.size for item in items)
    if len(sizes) > 1 and not FLAGS.image_size:
        one, other = ("{}x{}".format(*size) for size in list(sizes)[:2])
        logger.warning("images differ in size (%s, %s), which may reveal their source; see --image_size", one, other)
    return distinct(items)


def summarise_readers(answers: list[tuple[tuple[str, str], str, float]], synthetic: dict[tuple[str, str], bool]) -> str:
    """Return each reader's accuracy at telling photographs (3) from generated images (1), and Fleiss' kappa of all."""
    right, units = defaultdict(list), defaultdict(list)
    for key, reader, rating in answers:
        if key in synthetic:
            right[reader].append((rating < 2) == synthetic[key])
            units[key].append(rating)
    found = {
        reader: exact_binomial(sum(correct) / len(correct), len(correct), len(correct))
        for reader, correct in right.items()
    }
    lines = [f"{name}: {one.value:.1%} [{one.low:.1%}, {one.high:.1%}] of {one.n} right" for name, one in found.items()]
    kappa = fleiss_kappa(units.values())
    return "; ".join([*lines, f"Fleiss' kappa {'-' if kappa is None else format(kappa, '.2f')}"])


def main(_) -> None:
    try:
        from ddpo_pytorch.rating.server import is_loopback, listen, make_app, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise UserError(f'{error.name} is not installed; run: pip install -e ".[rate]"') from error

    expand_flags(FLAGS, ("out",), optional=("csv", "data_path"))
    rater = "" if FLAGS.rater is None else rater_name(FLAGS.rater)
    token = FLAGS.token or ("" if is_loopback(FLAGS.host) else secrets.token_urlsafe(32))
    if token and not re.fullmatch(r"[A-Za-z0-9_-]{16,128}", token):  # hard to guess, and the same in an address
        raise UserError("--token needs 16 to 128 of the characters A-Z, a-z, 0-9, _ and -; omit it to generate one")
    items = find_items()
    synthetic = {item.key: is_synthetic(item.path) for item in items} if FLAGS.mode == "real" else {}
    if synthetic and len(set(synthetic.values())) < 2:
        raise UserError("--mode=real needs photographs and images that say they are generated; give folders of both")
    sock = listen(FLAGS.host, FLAGS.port)
    port = sock.getsockname()[1]
    store = Store(FLAGS.out)
    square = dict(size=FLAGS.image_size or None, resize=FLAGS.resize)
    questions = Questions(items, store, FLAGS.seed)
    app = make_app(questions, FLAGS.host, port, token, rater, FLAGS.expert_level or 0, FLAGS.mode, **square)
    logger.info("%d images; ratings go to %s, which has %d; Ctrl-C ends", len(items), Path(FLAGS.out), len(store))
    name = socket.gethostname() if FLAGS.host in ("", "0.0.0.0", "::") else FLAGS.host
    name = f"[{name}]" if ":" in name else name
    logger.info("open http://%s:%d/%s", name, port, f"?token={token}" if token else "")
    serve(app, sock)
    if synthetic:
        logger.info("photograph or generated: %s", summarise_readers(store.answers(), synthetic))
    questions.close()
    logger.info("%d ratings are in %s, every click in %s", len(store), store.path, store.journal)


if __name__ == "__main__":
    cli(main)
