"""Rewards: values by hand, weighted sums, errors, and that no reward ever changes its input."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from ddpo_pytorch.data.isic import CAPTIONS, LABELS, labels_of
from ddpo_pytorch.judges.classifier import ArtifactClassifier
from ddpo_pytorch.rewards import REWARDS, Scorer, build_reward, check_prompts, isic_classifier_reward, parse_spec

SIZE, PROMPT_PAIR = "jpeg_compressibility", ("a cat", "a dog")
jpeg_compressibility, jpeg_incompressibility = REWARDS[SIZE](), REWARDS["jpeg_incompressibility"]()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return ArtifactClassifier(LABELS, image_size=64, arch="tinynet_e").eval()


def noisy_images(amounts):
    """Grey images with noise of the given amplitudes, (B, 3, 64, 64)."""
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    return torch.stack([0.5 + amount * noise for amount in amounts])


def metadata_of(prompts):
    return [{"label": list(labels_of(prompt))} for prompt in prompts]


def test_jpeg_size_is_in_kilobytes_and_grows_with_detail():
    images = noisy_images([0.0, 0.1, 0.4, 1.0])
    sizes, info = jpeg_incompressibility(images, ["x"] * 4, [{}] * 4)
    assert sizes.dtype == np.float64 and sizes.shape == (4,) and info == {}
    assert np.all(np.diff(sizes) > 0)
    buffer = io.BytesIO()
    array = (images[2] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    assert sizes[2] == len(buffer.getvalue()) / 1000
    np.testing.assert_array_equal(jpeg_compressibility(images, ["x"] * 4, [{}] * 4)[0], -sizes)


def test_classifier_reward_is_the_share_of_agreeing_attributes(classifier):
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    prompts = [CAPTIONS[i] for i in (0, 9, 21, 31)]
    rewards, info = isic_classifier_reward(classifier)(images, prompts, metadata_of(prompts))
    # reference: torchvision normalisation written out, sigmoid and threshold
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        probability = classifier((images - mean[:, None, None]) / std[:, None, None]).sigmoid()
    stated = torch.tensor([labels_of(prompt) for prompt in prompts])
    expected = [((p > 0.5) == s.bool()).sum().item() / 6 for p, s in zip(probability, stated, strict=True)]
    np.testing.assert_allclose(rewards, expected)
    np.testing.assert_array_equal(info["labels"], stated.numpy())
    np.testing.assert_array_equal(info["predictions"], (probability > 0.5).numpy())


def test_classifier_reward_reads_labels_from_metadata_then_from_the_prompt(classifier):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    reward, prompts = isic_classifier_reward(classifier), [CAPTIONS[3], CAPTIONS[20]]
    (from_prompts, _), (given, _) = reward(images, prompts, [{}, {}]), reward(images, ["a", "b"], metadata_of(prompts))
    np.testing.assert_array_equal(from_prompts, given)
    refused("'pink hair' is not one of the 32", reward, images, ["pink hair", CAPTIONS[0]], [{}, {}])
    (expected,) = reward(images[:1], ["a"], [{"label": [1, 0, 0, 1, 0, 1]}])[1]["labels"]
    for label in (torch.tensor([1, 0, 0, 1, 0, 1]), (True, False, False, True, False, True), [1.0, 0, 0, 1, 0, 1]):
        assert (reward(images[:1], ["a"], [{"label": label}])[1]["labels"] == expected).all()
    for label in ([1, 0], [0.7, 0, 0, 1, 0, 1], [2, 0, 0, 1, 0, 1], "hair", None):
        refused(re.escape(f"is {label!r}; "), reward, images, ["a", "b"], [{"label": label}, {"label": [1, 0] * 3}])
    other = ArtifactClassifier(("glaucoma", "NV"), image_size=32, arch="tinynet_e")
    refused("glaucoma, NV", isic_classifier_reward, other)


def test_weighted_sum_adds_parts_and_reports_them(classifier):
    kwargs = {"isic_classifier_reward": {"classifier": classifier}, "jpeg_compressibility": {}}
    images, prompts = noisy_images([0.1, 0.5]), list(CAPTIONS[:2])  # float32 at the classifier's own size
    metadata, before = metadata_of(prompts), images.clone()
    reward = build_reward("isic_classifier_reward:0.7, jpeg_compressibility:0.3", kwargs)
    total, info = reward(images, prompts, metadata)
    first, details = isic_classifier_reward(classifier)(images, prompts, metadata)
    second, _ = jpeg_compressibility(images, prompts, metadata)
    np.testing.assert_allclose(total, 0.7 * first + 0.3 * second)
    np.testing.assert_array_equal(info["isic_classifier_reward"], first)
    np.testing.assert_array_equal(info["jpeg_compressibility"], second)
    np.testing.assert_array_equal(info["isic_classifier_reward/predictions"], details["predictions"])
    np.testing.assert_allclose(build_reward("jpeg_compressibility:2")(images, prompts, metadata)[0], 2 * second)
    # and no reward changes its input
    assert torch.equal(images, before)
    assert metadata == metadata_of(prompts) and prompts == list(CAPTIONS[:2])


def test_specifications():
    spec = "jpeg_compressibility:-1e-2,jpeg_incompressibility,mine:shade,mine:tint:2"
    expected = {"jpeg_compressibility": (-0.01, ""), "jpeg_incompressibility": (1.0, "")}
    assert parse_spec(spec) == expected | {"shade": (1.0, "mine:shade"), "tint": (2.0, "mine:tint")}


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        ("aesthetic_score", {}, "'aesthetic_score' .* is unknown; .*isic_classifier_reward, jpeg_comp"),
        ("", {}, "'' .* is unknown"),
        ("jpeg_compressibility:nan", {}, "weight 'nan'"),
        ("jpeg_compressibility:1,jpeg_compressibility:2", {}, "twice.* weights"),
        ("one:shade,two:shade:2", {}, "'shade' appears twice.*rename"),
        ("./mine.py:shade", {}, r"'\./mine.py:shade' cannot be imported"),
        ("jpeg_compressibility:0,jpeg_incompressibility:0.0", {}, "are 0"),
        ("build_reward", {}, "'build_reward'.*REWARDS"),
        (SIZE, {SIZE: {"quality": 3}}, rf"reward_fn_kwargs.{SIZE} has \['quality'\] but .* takes \[\]"),
        (SIZE, {SIZE: 3}, f"reward_fn_kwargs.{SIZE} is 3"),
        (SIZE, {"isic_clasifier_reward": {"classifier": "H6"}}, "reward_fn_kwargs.isic_clasifier_reward"),
        ("isic_classifier_reward", {}, "isic_classifier_reward takes .*classifier"),
        ("isic_classifier_reward", {"isic_classifier_reward": {"classifier": "no.safetensors"}}, "'no.safetensors'"),
    ],
)
def test_bad_specifications_and_arguments_are_named(spec, kwargs, message):
    refused(message, build_reward, spec, kwargs)


@pytest.fixture
def returning(monkeypatch):
    """Function (value): the reward "mine" returns it, or what it returns for the images if it is a function."""

    def set_reward(value) -> None:
        function = value if callable(value) else lambda images: value
        monkeypatch.setitem(REWARDS, "mine", lambda: lambda images, prompts, metadata: function(images))

    return set_reward


def brightness(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(1, 2, 3))


VALUES = [
    ([0.25, 0.5], (0.25, 0.5)),
    ([torch.tensor(0.25, requires_grad=True), torch.tensor(0.5)], (0.25, 0.5)),
    ([[0.25], [0.5]], (0.25, 0.5)),
    (np.array([1, 3], dtype=np.int8), (1, 3)),
    (np.array([[0.25], [0.5]], dtype=np.float16), (0.25, 0.5)),
    (torch.tensor([0.25, 0.5], dtype=torch.bfloat16, requires_grad=True), (0.25, 0.5)),
]


@pytest.mark.parametrize("spec", ["mine", "mine:1.0,jpeg_compressibility:0.5", "mine:2"])
def test_numbers_of_every_kind_work_alone_and_in_sums(returning, spec):
    images = noisy_images([0.1, 0.5])
    size = jpeg_compressibility(images, PROMPT_PAIR, [{}, {}])[0]
    for values, expected in VALUES:
        returning((values, {"note": "x"}))
        reward = build_reward(spec)
        total, info = reward(images, PROMPT_PAIR, [{}, {}])
        wanted = np.array(expected, dtype=np.float64) * (2 if spec == "mine:2" else 1)
        assert isinstance(total, np.ndarray) and total.dtype == np.float64 and total.shape == (2,)
        np.testing.assert_array_equal(total, wanted + (0.5 * size if "jpeg" in spec else 0))
        if spec == "mine":
            assert info == {"note": "x"} and reward.parts == ()
        else:
            np.testing.assert_array_equal(info["mine"], expected)
            assert info["mine/note"] == "x" and reward.parts[0] == "mine"


@pytest.mark.parametrize(
    ("result", "stated"),
    [
        (([0.5], {}), "list of 1"),  # would be broadcast to the batch
        ((torch.tensor(0.5), {}), r"\(\)"),
        ((None, {}), "None"),
        ((["0.25", "0.5"], {}), "str"),
        (([[0.5], [0.5, 0.5]], {}), "list"),
        ([0.25, 0.5], "list of 2"),  # no pair of rewards and info, although it has two elements
        (brightness, r"\(2,\)"),
        (([0.25, 0.5], None), "NoneType"),
        (([0.25, float("nan")], {}), "'a dog'"),
    ],
)
def test_other_results_are_refused_by_name_at_the_trial_and_after(returning, result, stated):
    returning(result)
    for spec in ("mine", "mine:1.0,jpeg_compressibility:0.5"):
        reward, message = build_reward(spec), f"(?=.*'mine').*{stated}"
        refused(message, reward, noisy_images([0.1, 0.5]), PROMPT_PAIR, [{}, {}])
        refused(message, check_prompts, reward, [(prompt, {}) for prompt in PROMPT_PAIR])


def test_one_value_for_a_batch_a_sum_that_overflows_and_what_is_no_factory_are_named(monkeypatch, returning):
    returning(lambda images: ([images.mean().item()], {}))
    refused("'mine' .* list of 1 .* 2 images", check_prompts, build_reward("mine"), [("a cat", {})])
    returning(lambda images: (brightness(images), {}))
    check_prompts(build_reward("mine"), [(f"prompt {number}", {}) for number in range(33)])
    returning(([1e308, 0.0], {}))
    too_much = build_reward("mine:10,jpeg_compressibility:0")
    refused("'a cat' is inf", too_much, noisy_images([0.1, 0.5]), PROMPT_PAIR, [{}, {}])
    monkeypatch.setitem(REWARDS, "mine", lambda: None)
    refused("'mine'.*None", build_reward, "mine")


def moody(images, prompts, metadata):
    if "fail" in prompts:
        raise ZeroDivisionError("a defect")
    return np.where(np.array(prompts) == "nothing", np.nan, brightness(images).numpy()), {}


def test_rewards_come_in_the_order_of_submission_and_failures_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", None)  # even without a stream, it would initialise a GPU
    scorer = Scorer(moody, torch.device("cpu"))
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for part in images.split(2):
        scorer.submit(part, ["a", "b"], [{}, {}])
    assert scorer.collect()[:, 0] == pytest.approx(brightness(images).numpy(), rel=1e-6)
    scorer.submit(images[:2], ["a", "b"], [{}, {}], check=lambda images: images + 1)
    assert scorer.collect()[:, 0] == pytest.approx(1 + brightness(images[:2]).numpy(), rel=1e-6)

    # a reward that fails is reported at once with its prompts
    with pytest.raises(RuntimeError, match="'moody' failed on images of 'a', 'fail'") as failure:
        scorer.submit(torch.zeros(3, 3, 4, 4), ["a", "fail", "a"], [{}] * 3)
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    given = torch.zeros(2, 3, 4, 4), ["a", "nothing"], [{}] * 2
    refused("'moody' of an image of 'nothing' is nan", scorer.submit, *given)
    scorer.close()
