"""Selector and Policy: sizes, scores of single images, files, text encoders."""

import json
import math

import numpy as np
import pytest
import torch
from judge_tools import threshold_between
from rated_world import PROMPTS, stripes, write_bert
from safetensors.torch import save_file

from ddpo_pytorch.data.images import to_uint8
from ddpo_pytorch.judges.policy import Policy, TextFeatures, load_judges, load_policy_judge, save_policy
from ddpo_pytorch.judges.selector import MLP_RATIO, Selector, load_selector, save_selector
from ddpo_pytorch.judges.vit import VisionSizes, resized
from ddpo_pytorch.utils.errors import UserError

TINY = VisionSizes(image_size=32, patch_size=8, width=32, layers=2, heads=2, dropout=0.1)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("text") / "bert")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    drawn = [stripes(1 + number % 3, number > 2, rng) for number in range(6)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture
def selector():
    torch.manual_seed(0)
    return Selector(TINY)


@pytest.fixture
def policy(bert):
    torch.manual_seed(0)
    judge = Policy(TINY, TextFeatures(bert, 16))
    judge.fit_text(PROMPTS)
    return judge


def test_full_size_is_the_document_s():
    """At 512 px: 34.7 M parameters; for the Policy 86.0 M in an image branch of one channel, 1.48 M behind it."""

    class Text:
        width = 768

    with torch.device("meta"):
        selector, policy = Selector(VisionSizes(layers=6, mlp_ratio=MLP_RATIO)), Policy(VisionSizes(), Text())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in policy.named_children()}
    assert round(sum(p.numel() for p in selector.parameters()) / 1e6, 1) == 34.7
    assert round((count["encoder"] - 2 * 16 * 16 * 768) / 1e6, 1) == 86.0
    assert round(count["head"] / 1e6, 2) == 1.48
    assert [layer.out_features for layer in policy.head if hasattr(layer, "out_features")] == [768, 384, 1]
    assert [layer.out_features for layer in selector.head if hasattr(layer, "out_features")] == [256, 64, 1]
    assert (len(selector.encoder.vit.blocks), len(policy.encoder.vit.blocks)) == (6, 12)
    assert selector.encoder.vit.blocks[0].mlp.fc1.out_features == 2048


@pytest.mark.parametrize("judge", ["selector", "policy"])
def test_every_image_has_a_score_of_its_own(judge, images, request):
    judge = request.getfixturevalue(judge).train()
    arguments = (list(PROMPTS) * 3,) if isinstance(judge, Policy) else ()

    def score(order):
        return judge.score(images[order], *([given[number] for number in order] for given in arguments))

    scores = score(range(6))
    assert scores.shape == (6,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert ((scores > 0) & (scores < 1)).all()
    assert len(scores.unique()) == 6  # the public code's were all the same: attention ran across the batch
    order = [3, 0, 5, 1, 4, 2]
    torch.testing.assert_close(score(order), scores[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(score([2]), scores[2:3], rtol=0, atol=1e-6)  # neighbours do not matter
    assert torch.equal(score(range(6)), scores) and judge.training  # no dropout, and the mode is as it was


def test_scores_depend_on_where_patches_are(selector):
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flip(2, 3)
    moved = patches.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    assert torch.equal(moved[:, :, :8, :8], images[:, :, -8:, -8:])

    def change():
        return (selector.score(moved) - selector.score(images)).abs()

    assert change().mean() > 1e-5
    selector.encoder.vit.pos_embed.data.zero_()
    assert change().max() < 5e-7  # so it was the places


def test_exposure_is_seen_and_sizes_are_scaled(selector, images):
    assert ((selector.score(images * 0.5) - selector.score(images)).abs() > 1e-6).all()  # no stretch to min and max
    pixels = selector.preprocess(images)
    assert torch.equal(pixels, images * 2 - 1)
    large = torch.rand(2, 3, 96, 80, generator=torch.Generator().manual_seed(0))
    assert selector.preprocess(large).shape == (2, 3, 32, 32)
    torch.testing.assert_close(resized(large, 32).mean(), large.mean(), rtol=0, atol=0.01)
    assert selector.preprocess(to_uint8(large).float() / 255).abs().max() <= 1
    whites = resized(torch.ones(1, 3, 100, 100), 32)
    torch.testing.assert_close(whites, torch.ones(1, 3, 32, 32))


def test_policy_reads_the_prompt(policy, images):
    one, other = (policy.score(images, [prompt] * 6) for prompt in PROMPTS)
    assert ((one - other).abs() > 1e-4).all()
    with pytest.raises(ValueError, match="6 images.* 1 prompt"):
        policy.score(images, [PROMPTS[0]])


def test_text_features_are_centred_cls_states(policy, bert):
    features = (policy.text(PROMPTS) - policy.text_mean) / policy.text_scale
    # the states are nearly alike: centring leaves the rounding of numbers 1 / text_scale times as large
    rounding = torch.finfo(torch.float32).eps * float(policy.text_mean.abs().max() / policy.text_scale)
    torch.testing.assert_close(features.mean(0), torch.zeros(32), atol=8 * rounding, rtol=0)
    assert features.square().mean().item() == pytest.approx(1, abs=1e-3)
    tokenizer, encoder = policy.text._tokenizer, policy.text._encoder
    batch = tokenizer(list(PROMPTS), padding="max_length", max_length=16, return_tensors="pt")
    expected = encoder(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(policy.text(PROMPTS), expected, atol=1e-5, rtol=0)
    policy.fit_text(PROMPTS[:1])
    assert policy.text_scale == 1


def test_text_encoder_is_neither_trained_nor_saved(policy, tmp_path):
    assert all(name.split(".")[0] in ("encoder", "head", "text_mean", "text_scale") for name in policy.state_dict())
    assert not any(parameter.requires_grad for parameter in policy.text._encoder.parameters())


def test_long_prompts_are_cut_with_one_warning(policy, caplog):
    long = "Fundus: " + "stripes " * 40
    for _ in range(2):
        policy.text(["Fundus: blue", long])
    (record,) = caplog.records
    assert record.args == (1, 16, long)
    assert torch.equal(policy.text([long]), policy.text([long + "blue"]))


def test_threshold(selector, images):
    with pytest.raises(UserError, match="threshold"):
        selector.passes(images)
    scores = selector.score(images)
    selector.threshold = threshold_between(scores)
    assert 0 < selector.passes(images).sum() < 6
    assert torch.equal(selector.passes(images), scores >= selector.threshold)
    assert selector.accepts(torch.tensor([selector.threshold], dtype=torch.float64)).all()  # tau itself passes
    selector.threshold = 0.0
    assert selector.passes(images).all()


def test_files_hold_what_is_needed(selector, policy, bert, images, tmp_path):
    selector.threshold, selector.calibration, selector.origin = 0.25, {"how": "by hand"}, {"stage": 1}
    policy.origin = {"stage": 2}
    save_selector(selector, tmp_path / "selector.safetensors")
    save_policy(policy, tmp_path / "policy.safetensors")
    found, judge = load_judges(tmp_path)
    assert (found.threshold, found.calibration, found.origin) == (0.25, {"how": "by hand"}, {"stage": 1})
    assert found.sizes == TINY and judge.origin == {"stage": 2}
    assert torch.equal(found.score(images), selector.score(images))
    prompts = list(PROMPTS) * 3
    assert torch.equal(judge.score(images, prompts), policy.score(images, prompts))
    assert not found.training and not any(p.requires_grad for net in (found, judge) for p in net.parameters())


def refused(message, load, *arguments, **named):
    with pytest.raises(UserError, match=message) as caught:
        load(*arguments, **named)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_refused(selector, policy, tmp_path):
    save_selector(selector, tmp_path / "s.safetensors")
    save_policy(policy, tmp_path / "p.safetensors")
    refused("selector .*absent.* does not exist", load_selector, tmp_path / "absent")
    refused("p.safetensors.* selector", load_selector, tmp_path / "p.safetensors")
    refused("s.safetensors.* policy", load_policy_judge, tmp_path / "s.safetensors")
    small = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "heads": 2}
    for sizes, message in ((small, "x.* does not fit"), (3, "x.*'sizes' is 3")):
        save_file({"x": torch.zeros(1)}, tmp_path / "x", metadata={"selector": json.dumps({"sizes": sizes})})
        refused(message, load_selector, tmp_path / "x")


def test_another_text_encoder_is_refused_by_name(policy, tmp_path, tiny_pipeline_dir):
    save_policy(policy, tmp_path / "p.safetensors")
    other = write_bert(tmp_path / "other", seed=1)
    refused("p.safetensors.*/bert.*/other", load_policy_judge, tmp_path / "p.safetensors", text_encoder=other)
    copy = write_bert(tmp_path / "copy")
    assert load_policy_judge(tmp_path / "p.safetensors", text_encoder=copy).text.name == str(copy)
    refused("CLIP", TextFeatures, tiny_pipeline_dir)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 100, "image_size 100 .*patch_size 16"),
        ("heads", 5, "width 768 .*heads 5"),
        ("layers", 0, "layers is 0"),
        ("dropout", 1.0, "dropout is 1.0"),
        ("dropout", math.nan, "dropout is nan"),
        ("mlp_ratio", 17, "mlp_ratio is 17"),
    ],
)
def test_sizes_are_checked(field, value, message):
    refused(message, VisionSizes, **{field: value})
