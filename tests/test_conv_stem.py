"""The convolutional stem of a judge, and judges that learn from what an autoencoder leaves of photographs."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from scipy.ndimage import uniform_filter

from ddpo_pytorch.data.images import save_image, to_uint8
from ddpo_pytorch.data.ratings import RatedImage
from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.judges.selector import Selector, load_selector, save_selector
from ddpo_pytorch.judges.vit import Detail, VisionSizes, conv_stem
from ddpo_pytorch.rlhf.rated_images import read_rated, through_autoencoder
from ddpo_pytorch.rlhf.training import StageTraining
from ddpo_pytorch.utils.errors import UserError

SIZES = VisionSizes(image_size=32, patch_size=8, width=32, layers=1, heads=2, dropout=0.0, stem="conv")


def test_detail_is_the_image_and_what_a_mean_removes():
    image = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    both = Detail()(image)
    assert torch.equal(both[:, :3], image)
    inner = image[0, 1].numpy() - uniform_filter(image[0, 1].numpy(), 3)
    torch.testing.assert_close(both[0, 4, 1:-1, 1:-1], 8 * torch.from_numpy(inner)[1:-1, 1:-1])
    assert not both[:, 3:].isnan().any() and Detail()(torch.full((1, 3, 8, 8), 0.3))[:, 3:].abs().max() < 1e-6


def test_a_patch_is_a_token():
    stem = conv_stem(8, 32).eval()
    assert stem(torch.rand(2, 3, 32, 24)).shape == (2, 32, 4, 3)
    with pytest.raises(UserError, match="patch_size.*12"):
        VisionSizes(image_size=48, patch_size=12, width=32, heads=2, stem="conv")
    with pytest.raises(UserError, match="stem.*'deep'"):
        VisionSizes(stem="deep")


def test_scores_are_of_each_image_alone_and_survive_a_file(tmp_path):
    torch.manual_seed(0)
    selector, images = Selector(SIZES), torch.rand(6, 3, 32, 32)
    selector.train()(selector.preprocess(images))  # statistics of batch norm
    together = selector.score(images)
    torch.testing.assert_close(selector.score(images[2:3]), together[2:3])
    assert together.unique().numel() == 6
    save_selector(selector, tmp_path / "s.safetensors")
    assert torch.equal(load_selector(tmp_path / "s.safetensors").score(images), together)


def test_rated_photographs_pass_the_autoencoder(tmp_path):
    torch.manual_seed(0)
    vae = scratch.build_vae((8, 8), 32).eval().requires_grad_(False)
    rated = []
    for number in range(5):
        save_image(tmp_path / f"{number}.png", torch.rand(3, 32, 32))
        path = tmp_path / f"{number}.png"
        rated.append(RatedImage(path.name, path, "Fundus: drusen", 2.0, 3.0, 1.0, str(number), 1))
    plain = read_rated(rated, 32)
    passed = through_autoencoder(plain, vae, 2)
    assert isinstance(vae, AutoencoderKL) and passed.digest != plain.digest
    assert passed.rewards is plain.rewards and passed.prompts == plain.prompts
    mean = vae.encode(plain.images[3:4].float() / 127.5 - 1).latent_dist.mean.half().float()
    expected = to_uint8(vae.decode(mean).sample / 2 + 0.5)
    assert (passed.images[3:4].int() - expected.int()).abs().max() <= 1
    assert through_autoencoder(plain, vae, 5).images.shape == plain.images.shape


def test_the_learning_rate_rises_in_stage_1_only():
    training = SimpleNamespace(stage=1, rlhf=SimpleNamespace(warmup_steps=4))
    assert [StageTraining._warmup(training, update) for update in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    training.stage = 2
    assert StageTraining._warmup(training, 1) == 1.0
