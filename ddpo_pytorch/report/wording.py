"""What the page says differently of dermoscopic and of fundus images: names of measures, sentences, licences."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """`key` is the name in metrics.json of how well images show their prompts.

    `measure`, `Measure`: the measure in a sentence and at its beginning or in a table. `explained`: what it is, with
    {judge} for the judge's name in brackets. `claim` ... `unmeasured`: sentences of the findings. `meaning`, `use`,
    `limits`, `licences`, `origins` (the world by the beginning of a file's name) and `shared` (what splits must not
    share): of the cards. `caution`: of distances in features of the judge.
    """

    title: str
    key: str
    measure: str
    Measure: str
    explained: str
    claim: str
    alone: str
    ceiling: str
    ceiling_as_is: str
    unmeasured: str
    meaning: str
    use: tuple[str, ...]
    limits: tuple[str, ...]
    licences: str
    origins: Mapping[str, str]
    shared: str
    caution: str


DERMOSCOPIC = Wording(
    title="Generated dermoscopic images: alignment, fidelity, memorisation",
    key="APR",
    measure="APR",
    Measure="APR",
    explained=(
        "APR, the artifact prevalence rate, is the share of images in which the judge{judge} sees exactly the "
        "artifacts that the prompt states: one label too many or too few, and the image does not count."
    ),
    claim="{other} shows what its prompt states in {after} of its images, {base} in {before}",
    alone="The judge finds in {value} of {images} of {name} exactly the artifacts that the prompt states.",
    ceiling=(
        "On real images, mixed by caption as those of {names}{only}, the judge agrees with the caption in {value}: the "
        "rest is judge error, or wrong labels."
    ),
    ceiling_as_is=(
        "On {images} as they are, in a mix of captions that may not be the models', the judge agrees with the caption "
        "in {value}: the rest is judge error, or wrong labels."
    ),
    unmeasured="APR was not measured: nothing can be said about how often images show what their prompts state.",
    meaning="{name}: {value} of the images show what their prompt states (APR).",
    use=(
        "{names}: research on controlled generation of dermoscopic images, and on augmenting the training data of "
        "classifiers.",
        "Not for diagnosis, nor for any decision about a patient. Nothing here is a medical device, and a generated "
        "image is no photograph of a lesion.",
    ),
    limits=(
        "The judge is a classifier and no dermatologist: APR says that it sees the artifacts asked for, not that an "
        "image is medically right. No physician's reading of the images is recorded.",
        "Skin tone, age, sex and body site were not measured; fairness cannot be claimed.",
    ),
    licences=(
        "ISIC 2019 images are CC BY-NC 4.0, and weights trained on them inherit the non-commercial condition; Stable "
        "Diffusion 1.5 is under CreativeML OpenRAIL-M; phantom images and the mini weights are part of the code's "
        "repository (MIT) and hold no patient data."
    ),
    # names of image files by the world they come from: the archive's, and those of data/phantom.py
    origins={"ISIC_": "the ISIC archive", "PHANTOM_": "the phantom world, drawn by this code"},
    shared="lesions",
    # the judge may be near kin of the classifier that gave the reward
    caution=(
        "These are distances in features of the judge: where it was trained on the same images as the classifier of "
        "the reward, it shares that classifier's errors, and a smaller distance may be one of these."
    ),
)

FUNDUS = Wording(
    title="Generated fundus images: alignment, image statistics, fidelity, memorisation",
    key="alignment",
    measure="alignment",
    Measure="Alignment",
    explained=(
        "Alignment is the mean over images of the Policy's score for image and prompt, counted as 0 where the Selector "
        "does not let the image pass. Both learned from ratings; other ratings would have made other judges."
    ),
    claim="{other} has a mean alignment of {after}, {base} of {before}",
    alone="The judges find a mean alignment of {value} in {images} of {name}.",
    ceiling=(
        "Real images, mixed by caption as those of {names}{only}, have a mean alignment of {value}: more cannot be "
        "asked of generated ones."
    ),
    ceiling_as_is=(
        "{images} as they are, in a mix of captions that may not be the models', have a mean alignment of {value}."
    ),
    unmeasured="Alignment was not measured: nothing can be said about how well images show what their prompts state.",
    meaning="{name}: a mean alignment of {value} with the prompts.",
    use=(
        "{names}: research on controlled generation of fundus images, and on learning from experts' ratings.",
        "Not for diagnosis, nor for any decision about a patient. Nothing here is a medical device, and a generated "
        "image is no photograph of an eye.",
    ),
    limits=(
        "Selector and Policy are networks and no ophthalmologists: their scores guess what raters would have said, not "
        "that an image is medically right. Where a generator learned from these judges, a gain has to be confirmed by "
        "judges of other ratings.",
        "The image statistics describe images and do not grade them; what counts is their distance to real images.",
        "Age, sex, ethnic group and camera were not measured; fairness cannot be claimed.",
    ),
    licences=(
        "ODIR-5K photographs are for research, and weights trained on them are to be used within the same terms; "
        "Stable Diffusion is under CreativeML OpenRAIL-M; BioMedBERT is under MIT; drawn phantom images hold no "
        "patient data."
    ),
    origins={},
    shared="patients",
    caution=(
        "These are distances in features of the Selector: where the generator learned from it, or from a judge of the "
        "same ratings, a smaller distance may be an error that it learned."
    ),
)


def wording_of(result: Mapping) -> Wording:
    """The wording of a measurement, from what metrics.json says of its kind."""
    return FUNDUS if result.get("kind") == "fundus" else DERMOSCOPIC


def difference_of(comparison: Mapping) -> dict:
    """Quantity of the difference between two models' headline measure; {} where there is none."""
    return comparison.get(DERMOSCOPIC.key) or comparison.get(FUNDUS.key) or {}
