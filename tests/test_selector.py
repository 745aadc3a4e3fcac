"""Selector and Policy: sizes, scores of single images, both stems, a backbone, files, text encoders."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from judge_tools import threshold_between
from rated_world import PROMPTS, stripes, write_bert
from refusals import refused
from safetensors.torch import save_file
from scipy.ndimage import uniform_filter

from ddpo_pytorch.judges.policy import Policy, TextFeatures, load_judges, load_policy_judge, save_policy
from ddpo_pytorch.judges.selector import MLP_RATIO, Selector, load_selector, save_selector
from ddpo_pytorch.judges.vit import Detail, VisionSizes, conv_stem

TINY = VisionSizes(image_size=32, patch_size=8, width=32, layers=2, heads=2, dropout=0.1)
STEM = VisionSizes(image_size=32, patch_size=8, width=32, layers=1, heads=2, dropout=0.1, stem="conv")
BACKBONE = VisionSizes(image_size=32, width=32, backbone="test_efficientnet")
SIZES = {"selector": TINY, "policy": TINY, "criteria": TINY, "stem": STEM, "backbone": BACKBONE}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("text") / "bert")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    drawn = [stripes(1 + number % 3, number > 2, rng) for number in range(6)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def make(kind, bert=None):
    torch.manual_seed(0)
    if kind == "policy":
        judge = Policy(TINY, TextFeatures(bert, 16))
        judge.fit_text(PROMPTS)
        return judge
    selector = Selector(SIZES[kind], ("disc", "vessels") if kind == "criteria" else ())
    if kind == "backbone":  # a random one's features hardly differ between images
        selector.head[-1].weight.data.mul_(1000)
    return selector


@pytest.fixture
def policy(bert):
    return make("policy", bert)


def test_full_size_is_the_document_s():
    """At 512 px: 34.7 M parameters; for the Policy 86.0 M in an image branch of one channel, 1.48 M behind it."""
    with torch.device("meta"):
        selector = Selector(VisionSizes(layers=6, mlp_ratio=MLP_RATIO))
        policy = Policy(VisionSizes(), SimpleNamespace(width=768))
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (selector, policy.encoder, policy.head)]
    one_channel = counts[1] - 2 * 16 * 16 * 768 / 1e6
    assert (round(counts[0], 1), round(one_channel, 1), round(counts[2], 2)) == (34.7, 86.0, 1.48)
    for judge, widths in ((policy, [768, 384, 1]), (selector, [256, 64, 1])):
        assert [layer.out_features for layer in judge.head if hasattr(layer, "out_features")] == widths


@pytest.mark.parametrize("kind", SIZES)
def test_every_image_has_a_score_of_its_own(bert, kind, images):
    judge = make(kind, bert).train()
    arguments = (list(PROMPTS) * 3,) if kind == "policy" else ()
    if kind in ("stem", "backbone"):
        judge(judge.preprocess(images))  # statistics of batch norm

    def score(order):
        return judge.score(images[order], *([given[number] for number in order] for given in arguments))

    scores, order = score(range(6)), [3, 0, 5, 1, 4, 2]
    assert scores.shape == (6,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert ((scores > 0) & (scores < 1)).all()
    assert len(scores.unique()) == 6  # the public code's were all the same: attention ran across the batch
    torch.testing.assert_close(score(order), scores[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(score([2]), scores[2:3], rtol=0, atol=1e-6)  # neighbours do not matter
    assert torch.equal(score(range(6)), scores) and judge.training  # no dropout, and the mode is as it was


def test_exposure_is_seen_and_sizes_are_scaled(images):
    selector = make("selector")
    assert ((selector.score(images * 0.5) - selector.score(images)).abs() > 1e-6).all()  # no stretch to min and max
    assert torch.equal(selector.preprocess(images), images * 2 - 1)
    torch.testing.assert_close(selector.preprocess(torch.ones(1, 3, 100, 80)), torch.ones(1, 3, 32, 32))


def test_the_stem_sees_the_image_and_what_a_mean_removes():
    image = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    both = Detail()(image)
    assert torch.equal(both[:, :3], image)
    inner = image[0, 1].numpy() - uniform_filter(image[0, 1].numpy(), 3)
    torch.testing.assert_close(both[0, 4, 1:-1, 1:-1], 8 * torch.from_numpy(inner)[1:-1, 1:-1])
    assert Detail()(torch.full((1, 3, 8, 8), 0.3))[:, 3:].abs().max() < 1e-6
    assert conv_stem(8, 32).eval()(torch.rand(2, 3, 32, 24)).shape == (2, 32, 4, 3)  # a patch is a token


def test_policy_reads_the_prompt(policy, images, caplog):
    one, other = (policy.score(images, [prompt] * 6) for prompt in PROMPTS)
    assert ((one - other).abs() > 1e-4).all()
    with pytest.raises(ValueError, match="6 images.* 1 prompt"):
        policy.score(images, [PROMPTS[0]])
    long = "Fundus: " + "stripes " * 40
    for _ in range(2):
        policy.text(["Fundus: blue", long])
    (record,) = caplog.records
    assert record.args == (1, 16, long) and torch.equal(policy.text([long]), policy.text([long + "blue"]))


def test_text_features_are_centred_cls_states(policy):
    features = (policy.text(PROMPTS) - policy.text_mean) / policy.text_scale
    # the states are nearly alike: centring leaves the rounding of numbers 1 / text_scale times as large
    rounding = torch.finfo(torch.float32).eps * float(policy.text_mean.abs().max() / policy.text_scale)
    torch.testing.assert_close(features.mean(0), torch.zeros(32), atol=8 * rounding, rtol=0)
    assert features.square().mean().item() == pytest.approx(1, abs=1e-3)
    tokenizer, encoder = policy.text._tokenizer, policy.text._encoder
    batch = tokenizer(list(PROMPTS), padding="max_length", max_length=16, return_tensors="pt")
    torch.testing.assert_close(policy.text(PROMPTS), encoder(**batch).last_hidden_state[:, 0], atol=1e-5, rtol=0)
    policy.fit_text(PROMPTS[:1])
    assert policy.text_scale == 1 and not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(name.split(".")[0] in ("encoder", "head", "text_mean", "text_scale") for name in policy.state_dict())


@pytest.mark.parametrize("kind", ["selector", "criteria", "stem", "backbone"])
def test_files_hold_what_is_needed(bert, kind, policy, images, tmp_path):
    selector, prompts = make(kind, bert), list(PROMPTS) * 3
    scores, everything = selector.score(images), selector.score_all(images)
    assert everything.shape == (6, 3 if kind == "criteria" else 1) and torch.equal(scores, everything[:, 0])
    refused("threshold", selector.accepts, scores)
    selector.threshold = threshold_between(scores)
    assert 0 < selector.accepts(scores).sum() < 6
    assert selector.accepts(torch.tensor([selector.threshold], dtype=torch.float64)).all()  # tau itself passes
    selector.calibration, selector.origin, policy.origin = {"how": "by hand"}, {"stage": 1}, {"stage": 2}
    save_selector(selector, tmp_path / "selector.safetensors")
    save_policy(policy, tmp_path / "policy.safetensors")
    found, judge = load_judges(tmp_path)
    assert (found.calibration, found.origin, judge.origin) == ({"how": "by hand"}, {"stage": 1}, {"stage": 2})
    assert found.sizes == selector.sizes and torch.equal(found.accepts(scores), scores >= selector.threshold)
    assert found.criteria == selector.criteria and torch.equal(found.score_all(images), everything)
    assert torch.equal(judge.score(images, prompts), policy.score(images, prompts))
    assert not found.training and not any(p.requires_grad for net in (found, judge) for p in net.parameters())


def test_wrong_files_are_refused(policy, tmp_path, tiny_pipeline_dir):
    selector_file, policy_file = tmp_path / "s.safetensors", tmp_path / "p.safetensors"
    save_selector(make("selector"), selector_file)
    save_policy(policy, policy_file)
    refused("selector .*absent.* does not exist", load_selector, tmp_path / "absent")
    refused("p.safetensors.* selector", load_selector, policy_file)
    refused("s.safetensors.* policy", load_policy_judge, selector_file)
    small = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "heads": 2}
    for sizes, message in ((small, "x holds x,"), (3, "x.*'sizes' is 3")):
        save_file({"x": torch.zeros(1)}, tmp_path / "x", metadata={"selector": json.dumps({"sizes": sizes})})
        refused(message, load_selector, tmp_path / "x")
    other, copy = write_bert(tmp_path / "other", seed=1), write_bert(tmp_path / "copy")
    refused("p.safetensors.*/bert.*/other", load_policy_judge, policy_file, text_encoder=other)
    assert load_policy_judge(policy_file, text_encoder=copy).text.name == str(copy)
    refused("CLIP", TextFeatures, tiny_pipeline_dir)
    for fields, message in (
        ({"image_size": 100}, "image_size 100 .*patch_size 16"),
        ({"heads": 5}, "width 768 .*heads 5"),
        ({"layers": 0}, "layers is 0"),
        ({"dropout": math.nan}, "dropout is nan"),
        ({"image_size": 48, "patch_size": 12, "stem": "conv"}, "patch_size.*12"),
        ({"stem": "deep"}, "stem.*'deep'"),
        ({"backbone": "deep"}, "backbone 'deep'"),
    ):
        refused(message, VisionSizes, **fields)
