"""Rewards beside the rollout, requests to stop, and prompts without a text encoder."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpo_pytorch.generator.pipeline import PromptEmbeddings, load_pipeline
from ddpo_pytorch.training.scoring import TOTAL, Scorer
from ddpo_pytorch.utils.distributed import SIGNALS, StopRequest, StopRequested
from ddpo_pytorch.utils.errors import UserError

CPU = torch.device("cpu")


def brightness(images, prompts, metadata):
    if "fail" in prompts:
        raise ZeroDivisionError("a defect")
    rewards = images.mean(dim=(1, 2, 3)).numpy()
    return np.where(np.array(prompts) == "nothing", np.nan, rewards), {}


def test_rewards_come_in_the_order_of_submission():
    scorer = Scorer(brightness, CPU)
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for part in images.split(2):
        scorer.submit(part, ["a", "b"], [{}, {}])
    assert scorer.collect()[TOTAL] == pytest.approx(images.mean(dim=(1, 2, 3)).numpy(), rel=1e-6)
    scorer.submit(images[:2], ["a", "b"], [{}, {}])
    assert scorer.collect()[TOTAL].shape == (2,)
    scorer.close()


def test_a_reward_that_fails_is_told_at_once_with_its_prompts():
    scorer = Scorer(brightness, CPU)
    with pytest.raises(RuntimeError, match="'brightness' failed on images of 'a', 'fail'") as failure:
        scorer.submit(torch.zeros(3, 3, 4, 4), ["a", "fail", "a"], [{}] * 3)
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    with pytest.raises(UserError, match="'brightness' of an image of 'nothing' is nan"):
        scorer.submit(torch.zeros(2, 3, 4, 4), ["a", "nothing"], [{}] * 2)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_handlers_come_back(number):
    accelerator = SimpleNamespace(device=CPU, reduce=lambda tensor, how: tensor)
    before = signal.getsignal(number)
    with StopRequest(accelerator) as request:
        request.check()
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequested):
            request.check()
        assert request.name == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_complete_table_needs_no_text_encoder(tiny_pipeline_dir, caplog):
    pipe = load_pipeline(tiny_pipeline_dir)
    prompts = ["a photo of a mole", "a ruler " * 77]
    lazy = PromptEmbeddings(pipe)
    expected, negative = lazy(prompts), lazy.negative
    table = PromptEmbeddings(pipe)
    table.precompute(prompts)
    assert pipe.text_encoder is None
    assert any(
        "1 prompts exceed 77 tokens and are truncated, the first is 'a ruler" in text for text in caplog.messages
    )
    assert torch.equal(table(prompts[::-1]), expected.flip(0)) and torch.equal(table.negative, negative)
    with pytest.raises(KeyError, match="another.*precomputed"):
        table(["another"])
