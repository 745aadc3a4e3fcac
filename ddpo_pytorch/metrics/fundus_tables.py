"""The document's table 1 (image statistics) and the table of fundus images, as rows of text."""

from collections.abc import Mapping, Sequence

from ddpo_pytorch.metrics.fundus import JUDGES
from ddpo_pytorch.metrics.image_statistics import SETS
from ddpo_pytorch.metrics.tables import NOT_AVAILABLE, Table, number, percent

REAL = "real images"
DIGITS = 4  # as in the document


def table1(models: Mapping[str, Mapping], real: Mapping | None, names: Sequence[str], shape: Sequence[int]) -> Table:
    """A row a statistic: mean, standard deviation over images and n of real images and each model, and its distances.

    `names`: sets of statistics; `shape`: (height, width) of all images in pixels. Distances to the real images, of the
    same resolution: difference of means with interval, the same in standard deviations of the real images, and the
    1-Wasserstein distance in these.
    """
    sides = ({REAL: real} if real else {}) | dict(models)
    header = [f"at {shape[1]} x {shape[0]} px"]
    for name in sides:
        header += [name, f"sd {name}", f"n {name}"]
        if real and name != REAL:
            header += [f"{name} - real", f"{name} - real (sd)", f"W1 {name} (sd)"]
    rows = []
    for chosen in names:
        for statistic in SETS[chosen].columns:
            row = [f"{chosen}: {statistic}"]
            for name, part in sides.items():
                block = part["quality"][chosen]
                found = block["statistics"][statistic]
                row += [number(found["mean"], f".{DIGITS}f"), _plain(found["sd"]), str(block["images"])]
                if real and name != REAL:
                    row += [number(found["difference"], f".{DIGITS}f"), number(found["standardised"], ".2f")]
                    row.append(_plain(found["wasserstein"], ".2f"))
            rows.append(row)
    return header, rows


def fundus_table(models: Mapping[str, Mapping], real: Mapping | None, fid_part: str = "matched") -> Table:
    """A row a model, and the real images: judges, distances, inception score, MS-SSIM, number of images.

    `fid_part`: "matched" or "unmatched" (see `measure.fidelity`).
    """
    header = ["Model", "Selector ↑", "Pass rate ↑ (%)", "Policy ↑", "Alignment ↑ (%)", "FID ↓", "KID ↓ (x 1000)"]
    header += [
        "FD-judge ↓",
        "KID-judge ↓ (x 1000)",
        "IS ↑",
        "SSIM ↑",
        "MS-SSIM ↓",
        "MS-SSIM within prompts ↓",
        "Images",
    ]
    rows = []
    for name, part in [*models.items(), *([(REAL, real)] if real else [])]:
        judged = part["alignment"][JUDGES]
        inception = (part.get("fidelity") or {}).get("inception", {}).get(fid_part, {})
        judge = (part.get("fidelity") or {}).get("judge", {}).get("matched", {})
        structure = part.get("structure") or {}
        score = part.get("inception_score") or {}
        spread = f" ± {score['sd']:.2f}" if score.get("sd") is not None else ""
        rows.append(
            [
                name,
                number(judged["selector"], ".3f"),
                percent(judged["pass_rate"]),
                number(judged["policy"], ".3f"),
                percent(judged["alignment"]),
                number(inception.get("FID"), ".2f"),
                number(inception.get("KID"), ".2f", 1000),
                number(judge.get("FID"), ".4g"),
                number(judge.get("KID"), ".4g", 1000),
                number(score.get("IS"), ".2f") + spread,
                number(structure.get("SSIM"), ".3f"),
                number(structure.get("MS_SSIM"), ".3f"),
                number(structure.get("MS_SSIM_within"), ".3f"),
                str(part["images"]),
            ]
        )
    return header, rows


def _plain(value: float | None, form: str = f".{DIGITS}f") -> str:
    return NOT_AVAILABLE if value is None else format(value, form)
